"""A moving average of the weights, which is evaluated beside them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """Keeps w <- decay w + (1 - decay) W of the parameters and of the buffers with a fraction, such as BatchNorm's.

    The parameters' average is the same on all ranks; the buffers' is a rank's own, as they are.

    Args:
        model: The model; the average starts from its present weights.
        decay: What a step keeps of the average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._parameters = {name: each.detach() for name, each in model.named_parameters()}
        self._buffers = {name: each for name, each in model.named_buffers() if each.is_floating_point()}
        self._averages = {name: each.clone() for name, each in (self._parameters | self._buffers).items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights after a step; on the device, without waiting for it."""
        for average, weight in zip(self._averages.values(), self._weights(), strict=True):
            average.lerp_(weight, 1 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the average in the place of the weights while the context lasts."""
        own = [each.clone() for each in self._weights()]
        self._put(list(self._averages.values()))
        try:
            yield
        finally:
            self._put(own)

    def shared_state(self) -> dict[str, Tensor]:
        """Returns what is the same on all ranks."""
        return {name: self._averages[name] for name in self._parameters}

    def own_state(self) -> dict[str, Tensor]:
        """Returns what is this rank's own."""
        return {name: self._averages[name] for name in self._buffers}

    def load(self, shared: Mapping[str, Any], owns: Sequence[Mapping[str, Any]]) -> None:
        """Puts saved averages back; the buffers take the mean over the ranks that saved."""
        saved = {**shared, **{name: torch.stack([own[name] for own in owns]).mean(0) for name in self._buffers}}
        for name, average in self._averages.items():
            average.copy_(saved[name])

    def _weights(self) -> list[Tensor]:
        return [*self._parameters.values(), *self._buffers.values()]

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for weight, value in zip(self._weights(), values, strict=True):
            weight.copy_(value)
