"""Runs a closure several times in one step as if it ran once: the same dropout masks, buffers updated once."""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfdist.errors import KfdistError
from kfdist.runtime.forward_state import ForwardState

Closure = Callable[..., tuple[Tensor, Tensor] | tuple[Tensor, Tensor, int]]
"""Runs the model on the step's batch and returns (output, loss), or (output, loss, examples); no backward.

It is called with the tensors of the batch, or with the same rows of each, where `AdaptiveStep.step` was given them.
"""


@dataclass(frozen=True)
class Evaluation:
    """What a closure returned.

    Attributes:
        output: The tensor that the loss was computed from.
        loss: A scalar.
        examples: Number of terms that the loss averages.
        stated: Whether the closure stated that number.
    """

    output: Tensor
    loss: Tensor
    examples: int
    stated: bool


class Replay:
    """One step's closure. `first` is the training forward; every later run starts from the same state as that one.

    After each later run, the model's buffers and torch's generators are as the training forward left them. Python's and
    NumPy's generators aren't reset: a closure that draws from them sees another batch at every run.

    Args:
        closure: The user's closure.
        batch: What it is called with: tensors whose dim 0 are the same examples, or nothing.
        model: The module that it runs.
        device: Where the model is.

    Attributes:
        rows: How many examples the tensors have; 0 without a tensor.

    Raises:
        KfdistError: The tensors have no examples, or not the same number of them.
    """

    def __init__(self, closure: Closure, batch: Sequence[Tensor], model: nn.Module, device: torch.device) -> None:
        self._closure = closure
        self._batch = tuple(batch)
        self.rows = _rows(self._batch)
        self._model = model
        self._device = device
        self._before = ForwardState(model, device)
        self._after = self._before

    def first(self) -> Evaluation:
        """Runs the training forward, with gradients.

        Raises:
            KfdistError: The closure returned something else than it must.
        """
        with torch.enable_grad():
            evaluation = _checked(self._closure(*self._batch))
        self._after = ForwardState(self._model, self._device)
        if not evaluation.loss.requires_grad:
            raise KfdistError(
                "the closure's loss has no graph; compute it with gradients on, and return it without .item(), "
                ".detach() or a backward"
            )
        return evaluation

    def again(
        self, rows: Tensor | None = None, then: Callable[[Evaluation], None] = lambda evaluation: None
    ) -> Evaluation:
        """Runs the closure once more, in the gradient mode of the caller.

        Args:
            rows: Which examples of the batch's tensors it is given; all if None.
            then: What to do before buffers are put back: a backward through BatchNorm needs them as they were.
        """
        run = self.of(rows)
        with self.replaying():
            evaluation = run()
            then(evaluation)
            return evaluation

    def of(self, rows: Tensor | None) -> Callable[[], Evaluation]:
        """Returns what runs the closure on some examples, on all if None, from the state that it finds."""
        batch = self._batch if rows is None else [each.index_select(0, rows.to(each.device)) for each in self._batch]
        return lambda: _checked(self._closure(*batch))

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Puts the state of the training forward's start in place, and afterwards that of its end."""
        self._before.restore()
        try:
            yield
        finally:
            self._after.restore()

    def undo(self) -> None:
        """Puts buffers and generators back to before the training forward."""
        self._before.restore()


def _rows(batch: tuple[Tensor, ...]) -> int:
    """Returns how many examples the tensors have; 0 without a tensor."""
    for number, each in enumerate(batch):
        if not isinstance(each, Tensor):
            raise KfdistError(
                f"argument {number + 1} of the batch is of type {type(each).__name__}; the tensors are needed that the "
                "closure takes, with the examples along dim 0. What isn't one belongs into the closure"
            )
    lengths = {each.shape[0] if each.dim() else 0 for each in batch}
    if len(lengths) > 1 or 0 in lengths:
        shapes = ", ".join(str(tuple(each.shape)) for each in batch)
        raise KfdistError(
            f"the batch's tensors are {shapes}; equally many examples, at least 1, are needed along dim 0"
        )
    return lengths.pop() if lengths else 0


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
