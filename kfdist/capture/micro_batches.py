"""Which backwards count for the next step, and which of them are of one micro-batch.

Backwards that go through the same forward are one micro-batch, whose loss is the sum of theirs; so are the forwards
that one backward goes through. Backwards whose gradients were dropped, as `zero_grad` does, count for nothing.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfdist.capture.passes import ForwardPass
from kfdist.capture.stated import NOTHING_STATED, Stated
from kfdist.torch_internals import accumulates, accumulates_below, changes_in_place, entries_of, when_backward_ends


class MicroBatch:
    """A share of a step's loss.

    Attributes:
        stated: What the user says of it.
        part_of: What it turned out to be a part of.
    """

    def __init__(self, stated: Stated = NOTHING_STATED) -> None:
        self.stated = stated
        self.part_of: MicroBatch | None = None

    @property
    def whole(self) -> "MicroBatch":
        """Itself, or the one that it turned out to be a part of."""
        return self if self.part_of is None else self.part_of.whole

    def join(self, other: "MicroBatch") -> None:
        """Makes one of both; they are different and whole."""
        self.stated = self.stated.completed(other.stated)
        other.part_of = self


@dataclass(frozen=True)
class _Left:
    """The gradients that were there when a backward ended, as they were then."""

    versions: Sequence[tuple[Tensor, int | None]]


class MicroBatches:
    """The micro-batches since the last step."""

    def __init__(self) -> None:
        self._of_backward: dict[int, MicroBatch] = {}
        self._of_forward: dict[ForwardPass, MicroBatch] = {}
        self._left: _Left | None = None
        self._running: Callable[[], object] = _nothing

    def __len__(self) -> int:
        return len({batch.whole for batch in self._of_backward.values()})

    def __contains__(self, backward: int) -> bool:
        return backward in self._of_backward

    @property
    def latest_backward(self) -> int:
        """The backward that began last; there is one."""
        return next(reversed(self._of_backward))

    def of_backward(self, backward: int) -> MicroBatch:
        """Returns the micro-batch of a backward that has begun."""
        return self._of_backward[backward].whole

    def examples(self) -> dict[MicroBatch, int | None]:
        """Returns how many examples each micro-batch has, as stated or by its forwards; None where nobody knows."""
        found = {batch.whole: batch.whole.stated.examples for batch in self._of_backward.values()}
        for forward, batch in self._of_forward.items():
            if batch.whole in found:
                found[batch.whole] = found[batch.whole] or (forward.examples if forward.whole else None)
        return found

    def of_forward(self, forward: ForwardPass) -> MicroBatch:
        """Returns the micro-batch of a forward."""
        return self._of_forward.setdefault(forward, MicroBatch()).whole

    def begin(self, backward: int, stated: Stated, parameters: Sequence[Tensor]) -> None:
        """The running backward begins, and is not one of those that are known already.

        Args:
            backward: Its number.
            stated: What the user says of its loss.
            parameters: Those whose gradients tell whether it counts.
        """
        self._of_backward[backward] = MicroBatch(stated)

        def ended() -> None:
            left = [(each, changes_in_place(each.grad)) for each in parameters if each.grad is not None]
            self._left = _Left(left)

        self._left, self._running = None, weakref.ref(ended)  # torch forgets it when the backward fails, too
        when_backward_ends(ended)

    def reach(self, backward: int, forward: ForwardPass) -> MicroBatch:
        """A backward that has begun reaches a forward; returns the micro-batch of both."""
        batch = self._of_backward[backward].whole
        of_forward = self._of_forward.setdefault(forward, batch).whole
        if of_forward is not batch:
            of_forward.join(batch)
        return of_forward

    def unstated(self) -> list[ForwardPass]:
        """Returns the forwards of micro-batches of which nobody stated how many terms their loss averages."""
        return [forward for forward, batch in self._of_forward.items() if batch.whole.stated.examples is None]

    def dropped(self, parameters: Sequence[Tensor]) -> bool:
        """Says whether the gradients that the backwards so far have made are gone: all of them absent or zero.

        Sure where there were any when the last backward ended, or where it failed. Gradients that were all changed in
        place since are read, so that the host waits for their device, at most twice: they may have been zeroed, or
        clipped, and what is measured next depends on which. `zero_grad()` as it is by default leaves none to read.

        Args:
            parameters: Those whose gradients tell whether a backward that failed counts.
        """
        if not self._of_backward:
            return False
        if self._left is None:
            if self._running() is not None:
                return False  # this one is nested in it
            left: Sequence[tuple[Tensor, int | None]] = [(each, None) for each in parameters]
        else:
            left = self._left.versions
        present = [(each.grad, version) for each, version in left if each.grad is not None]
        if not left or any(changes_in_place(gradient) == version for gradient, version in present):
            return False
        for some in (present[:1], present[1:]):  # mostly the first one tells
            found = [_any_number(gradient).to(some[0][0].device, non_blocking=True) for gradient, _ in some]
            if found and bool(torch.stack(found).any()):
                return False
        return True

    def forget(self) -> None:
        """Starts afresh."""
        self._of_backward.clear()
        self._of_forward.clear()
        self._left, self._running = None, _nothing


def makes_gradients(parameters: Iterable[Tensor], *, of_any: bool) -> bool:
    """Says whether the running backward adds to gradients of these, or of any; `torch.autograd.grad` adds to none."""
    return (of_any and accumulates_below()) or any(each.requires_grad and accumulates(each) for each in parameters)


def _any_number(gradient: Tensor) -> Tensor:
    values = entries_of(gradient)[1] if gradient.is_sparse else gradient
    return (values != 0).any()


def _nothing() -> None:
    return None
