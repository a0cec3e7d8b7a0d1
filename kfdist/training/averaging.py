"""A moving average of the weights, which is evaluated beside them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kfdist.errors import ModelChanged


class WeightAverage:
    """Keeps w <- decay w + (1 - decay) W of the parameters and of the buffers with a fraction, such as BatchNorm's.

    Weights are looked up by name each time, so that a buffer is followed that a forward replaces (`self.mean = new`).
    One that gets another shape or dtype, as a cache that grows with the sequences, begins its average anew from it.
    The parameters' average is the same on all ranks; the buffers' is a rank's own, as they are.

    Args:
        model: The model; the average starts from its present weights.
        decay: What a step keeps of the average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        parameters = dict(model.named_parameters())
        buffers = {name: each for name, each in model.named_buffers() if each.is_floating_point()}
        self._parameters, self._buffers = list(parameters), list(buffers)
        self._places = {name: _place(model, name) for name in (*parameters, *buffers)}
        self._averages = {name: each.detach().clone() for name, each in (parameters | buffers).items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights after a step; on the device, without waiting for it.

        Raises:
            ModelChanged: A weight is gone, or a parameter has another shape or dtype.
        """
        for average, weight in zip(*self._averages_and_weights(), strict=True):
            average.lerp_(weight, 1 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the average in the place of the weights while the context lasts.

        Buffers that are replaced within it are put back, too.

        Raises:
            ModelChanged: As for `update`.
        """
        averages, weights = self._averages_and_weights()
        own = [each.detach().clone() for each in weights]
        _put(weights, averages)
        try:
            yield
        finally:
            _put(weights, own)
            for (module, attribute), weight in zip(self._places.values(), weights, strict=True):
                if getattr(module, attribute, None) is not weight:
                    setattr(module, attribute, weight)

    def shared_state(self) -> dict[str, Tensor]:
        """Returns what is the same on all ranks."""
        return {name: self._averages[name] for name in self._parameters}

    def own_state(self) -> dict[str, Tensor]:
        """Returns what is this rank's own."""
        return {name: self._averages[name] for name in self._buffers}

    def load(self, shared: Mapping[str, Any], owns: Sequence[Mapping[str, Any]]) -> None:
        """Puts saved averages back; the buffers take the mean over the ranks that saved.

        A buffer that was saved in another shape than it has begins its average anew.
        """
        for name in self._parameters:
            self._averages[name].copy_(shared[name])
        for name in self._buffers:
            average, saved = self._averages[name], [own[name] for own in owns]
            if all(each.shape == average.shape for each in saved):
                average.copy_(torch.stack(saved).mean(0))

    @torch.no_grad()
    def _averages_and_weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the averages and the weights as they are now, in one order; each average fits its weight."""
        weights = []
        for name, (module, attribute) in self._places.items():
            weight, average = getattr(module, attribute, None), self._averages[name]
            if not isinstance(weight, Tensor):
                raise ModelChanged(
                    f"{name!r} is {weight!r} and was a tensor when the average of the weights began; keep it one, or "
                    "remove optimizer.average_decay"
                )
            if (weight.shape, weight.dtype) != (average.shape, average.dtype):
                if isinstance(weight, nn.Parameter):
                    raise ModelChanged(
                        f"parameter {name!r} is {list(weight.shape)} of {weight.dtype} and was {list(average.shape)} "
                        f"of {average.dtype} when the average of the weights began; make the model as it is trained"
                    )
                self._averages[name] = weight.clone()
            weights.append(weight)
        return list(self._averages.values()), weights


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Returns the module that has a weight of this name, and what it calls it."""
    module, _, attribute = name.rpartition(".")
    return model.get_submodule(module), attribute


@torch.no_grad()
def _put(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)
