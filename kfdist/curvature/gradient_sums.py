"""The weighted sums of a gradient's moments over steps, of one block, on the one rank that keeps them."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kfdist.curvature.averages import all_finite
from kfdist.curvature.statistics import MODES
from kfdist.linalg.psd import pack_triangle, unpack_triangle

WEIGHT, DROPPED = "weight", "dropped"
"""Names of the sum of weights among the tensors that travel, and of the number of dropped gradients in a state."""


class GradientSums:
    """(S, w) of one block: S <- rho S + g x and w <- rho w + g for a step with moments x.

    The gain g is 1 - rho, or 1 where nothing decays: S is then the plain sum.

    Args:
        shapes: Of the sums, by name of their mode.
        groups: c, for modes that aren't there.
        dtype: Of the sums.
        device: Where they live.

    Attributes:
        dropped: How many gradients were dropped as non-finite, a scalar.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        groups: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self._sums = {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
        self._absent = torch.zeros(groups, 0, dtype=dtype, device=device)
        self._weight = torch.zeros(1, dtype=dtype, device=device)
        self.dropped: Float[Tensor, ""] = torch.zeros((), dtype=torch.float32, device=device)

    def fold(
        self, moments: Mapping[str, Tensor] | None, rho: float, step_is_finite: Bool[Tensor, ""] | None = None
    ) -> None:
        """Folds one step in, without a host sync.

        Args:
            moments: The gradient's, by name; None if there was none. Non-finite ones add zero, like none, and are
                counted. They are overwritten.
            rho: Decay, up to 1.
            step_is_finite: Where it is false, the whole step is skipped and nothing changes.
        """
        rho_now: float | Tensor = rho
        if step_is_finite is not None:
            rho_now = torch.where(step_is_finite, torch.full_like(self._weight, rho), 1.0)
        for total in (*self._sums.values(), self._weight):
            total.mul_(rho_now)
        if moments is None:
            return
        finite = all_finite(moments.values())
        counts = finite if step_is_finite is None else finite & step_is_finite
        gain = 1.0 if rho == 1.0 else 1.0 - rho
        for name, total in self._sums.items():
            total.add_(torch.where(counts, moments[name], 0.0), alpha=gain)
        self._weight.add_(counts, alpha=gain)
        self.dropped.add_((~finite).to(self.dropped.dtype))

    def tensors(self) -> list[Float[Tensor, "..."]]:
        """Returns what it holds, for who counts its bytes."""
        return [*self._sums.values(), self._weight, self.dropped]

    def packed(self) -> dict[str, Tensor]:
        """Returns copies that a job takes: the fields of `GradientMoments`, sums as packed triangles."""
        sums = {name: pack_triangle(self._sums[name]) if name in self._sums else self._absent for name in MODES}
        return {**sums, WEIGHT: self._weight.clone()}

    def state_dict(self) -> dict[str, Tensor]:
        """Returns copies of everything."""
        sums = {name: pack_triangle(total) for name, total in self._sums.items()}
        return {**sums, WEIGHT: self._weight.clone(), DROPPED: self.dropped.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what `state_dict` returned."""
        for name, total in self._sums.items():
            total.copy_(unpack_triangle(state[name]))
        self._weight.copy_(state[WEIGHT])
        self.dropped.copy_(state[DROPPED])
