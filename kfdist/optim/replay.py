"""Runs a closure several times in one step as if it had run once: the same dropout masks, buffers moved once."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfdist.errors import KfdistError

Closure = Callable[[], tuple[Tensor, Tensor] | tuple[Tensor, Tensor, int]]
"""Runs the model on the step's batch and returns (output, loss), or (output, loss, examples); no backward."""


@dataclass(frozen=True)
class Evaluation:
    """What a closure returned.

    Attributes:
        output: What the loss was computed from.
        loss: A scalar.
        examples: How many terms the loss averages.
        stated: Whether the closure said how many.
    """

    output: Tensor
    loss: Tensor
    examples: int
    stated: bool


class _ForwardState:
    """Buffers and generators at one moment: all that a forward changes besides gradients."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        # The tensor itself is kept beside its values: a module may have put another one in its place.
        self._buffers = [
            (module._buffers, name, buffer, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
        with torch.no_grad():
            for home, name, buffer, values in self._buffers:
                buffer.copy_(values)
                home[name] = buffer


class Replay:
    """One step's closure. `first` is the training forward; every later run starts from the state that it started from.

    After each later run, BatchNorm's averages and torch's generators (the CPU's and the model's device's) are as the
    training forward left them. Python's and NumPy's generators are not ours to touch: a closure that draws from them
    would see another batch at every run.

    Args:
        closure: The user's.
        model: The module that it runs.
        device: Where the model is.
    """

    def __init__(self, closure: Closure, model: nn.Module, device: torch.device) -> None:
        self._closure = closure
        self._model = model
        self._device = device
        self._before = _ForwardState(model, device)
        self._after = self._before

    def first(self) -> Evaluation:
        """Runs the training forward, with gradients.

        Raises:
            KfdistError: The closure returned something else than it has to.
        """
        with torch.enable_grad():
            evaluation = _checked(self._closure())
        self._after = _ForwardState(self._model, self._device)
        if not evaluation.loss.requires_grad:
            raise KfdistError(
                "the closure's loss has no graph; compute it with gradients on, and return it without .item(), "
                ".detach() or a backward"
            )
        return evaluation

    def again(self) -> Evaluation:
        """Runs the closure once more, in the gradient mode of the caller."""
        self._before.restore()
        try:
            return _checked(self._closure())
        finally:
            self._after.restore()

    def undo(self) -> None:
        """Puts buffers and generators back to before the training forward."""
        self._before.restore()


def _checked(returned: Any) -> Evaluation:
    if not isinstance(returned, tuple) or len(returned) not in (2, 3):
        raise KfdistError(
            f"the closure returned {type(returned).__name__}; (output, loss), or (output, loss, examples), is needed"
        )
    output, loss = returned[0], returned[1]
    if not isinstance(output, Tensor) or not output.dim() or not output.is_floating_point():
        raise KfdistError("the closure's output is no floating-point tensor with a batch dimension")
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise KfdistError("the closure's loss is no scalar tensor")
    stated = len(returned) == 3
    try:
        examples = operator.index(returned[2]) if stated else output.shape[0]
    except TypeError:
        examples = 0
    if examples < 1:
        raise KfdistError(
            f"the closure's number of examples is {returned[2] if stated else examples!r}; how many terms its loss "
            "averages, at least 1, is needed"
        )
    return Evaluation(output, loss.reshape(()), examples, stated)
