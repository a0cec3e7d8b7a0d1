"""The scale of a GradScaler, which is in the gradients of a scaled loss."""

import torch
from torch import Tensor

from kfdist.errors import KfdistError
from kfdist.torch_internals import device_scale, scaler_cycle


class LossScale:
    """What a scaler multiplies the loss by.

    Args:
        scaler: The scaler; None, or one that is turned off, for a loss as it is.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._cycle: object = None

    @property
    def is_on(self) -> bool:
        """Whether the loss is scaled."""
        return self._scaler is not None

    def moved_on(self) -> bool:
        """Says whether the scaler was updated since it was asked last: a whole iteration has passed."""
        if self._scaler is None:
            return False
        before, self._cycle = self._cycle, scaler_cycle(self._scaler)  # which `update` replaces by a new one
        return self._cycle is not before

    def of_products(self) -> Tensor | float:
        """Returns what divides the scale out of a product of two gradients, on its device.

        Raises:
            KfdistError: The loss was not scaled.
        """
        if self._scaler is None:
            return 1.0
        scale = device_scale(self._scaler)
        if scale is None:
            raise KfdistError("the loss was not scaled by the GradScaler; call scaler.scale(loss).backward()")
        return scale**-2
