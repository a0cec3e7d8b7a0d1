"""The step of a run without second-order method: what SGD or AdamW alone would do, for comparisons."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfdist.comm.communicator import Communicator, Pending
from kfdist.runtime.settings import StepReport
from kfdist.types import RunSettings, Sample


class NoPreconditioner:
    """Has the part of `kfdist.Preconditioner`'s face that a trainer uses, and leaves the gradients as they are.

    Ranks still agree on stops: whether any rank was asked to is all-reduced at the end of each step and read at the end
    of the next, like the table of `Preconditioner`.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._stop_requested = False
        self._stop = False
        self._step = 0
        self._flag = torch.zeros(1, dtype=torch.int64, device=communicator.device)
        self._pending: Pending | None = None

    def observe(self, output: Tensor, loss: str = "cross_entropy") -> None:
        """Does nothing: there is no Fisher matrix."""

    def step(self) -> StepReport:
        """Agrees on stops; all ranks must call it."""
        self._complete()
        self._flag.fill_(int(self._stop_requested))
        self._pending = self._communicator.all_reduce_max(self._flag)
        self._step += 1
        return StepReport(
            step=self._step - 1,
            settings=RunSettings(),
            stop=self._stop,
            adopted=(),
            waited_seconds=0.0,
            phase_seconds={},
        )

    def request_stop(self) -> None:
        """Asks all ranks to stop at the same later step. Safe to call from a signal handler."""
        self._stop_requested = True

    def staleness(self) -> Mapping[str, int]:
        """Returns nothing: there are no inverses."""
        return {}

    def beat(self, phase: str, samples: Sequence[Sample] = ()) -> None:
        """Does nothing: there is no courier."""

    def counters(self) -> dict[str, Any]:
        """Returns totals in the form of `Preconditioner.counters`."""
        return {"bytes": {}, "inversions": {"completed": 0, "failed": 0, "by_method": {}}, "staleness_steps": {}}

    def fold(self) -> None:
        """Does nothing: there are no statistics."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the step."""
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved step."""
        self._step = int(state["step"])

    def close(self) -> None:
        """Completes what is in flight; all ranks must call it."""
        self._complete()

    def abandon(self) -> None:
        """Does nothing: there is nothing to let go of."""

    def _complete(self) -> None:
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
            self._stop = self._stop or bool(self._flag.item())
