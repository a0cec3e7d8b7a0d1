"""A model that is trained step by step, each step timed by its parts."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.utils.flop_counter import FlopCounterMode

from kfdist.bench.workloads import Workload
from kfdist.runtime.preconditioner import Preconditioner

PARTS = ("zero_grad", "forward", "backward", "preconditioner", "optimizer")
"""Of a step, in order."""


KINDS = ("adopts", "reduces", "folds", "nothing due")
"""Of steps behind a preconditioner, by the most that some group has at it; the first that holds."""


@dataclass(frozen=True)
class TimedStep:
    """One step.

    Attributes:
        seconds: Of the wall clock, by part.
        cpu: CPU seconds of the thread that trains.
        phases: Of the preconditioner's part, by its own phases.
        kind: One of `KINDS`; empty without a preconditioner.
    """

    seconds: Mapping[str, float]
    cpu: float
    phases: Mapping[str, float]
    kind: str = ""

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(self.seconds.values())


def counting() -> FlopCounterMode:
    """Returns what counts operations inside a `with`, products that are added in place among them: torch knows none."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: _of_products})


def _of_products(_sum: Sequence[int], left: Sequence[int], right: Sequence[int], **_named: object) -> int:
    """Returns the operations of a sum of batched products, from the shapes of its factors."""
    return 2 * math.prod(left) * right[-1]


class Trainee:
    """A model that is trained step by step, by SGD alone or behind a preconditioner.

    Args:
        workload: What is trained.
        preconditioner_of: Makes the model's preconditioner; None for SGD alone.
        seed: Of parameters and batches; equal seeds see equal batches.
    """

    def __init__(
        self, workload: Workload, preconditioner_of: Callable[[torch.nn.Module], Preconditioner] | None, seed: int
    ) -> None:
        self._workload = workload
        self.model = workload.model(seed)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=workload.lr, momentum=0.9)
        self.preconditioner = None if preconditioner_of is None else preconditioner_of(self.model)
        self._draw = workload.batches(torch.Generator().manual_seed(seed))
        self.loss = torch.tensor(float("nan"))

    def step(self) -> TimedStep:
        """Trains one step; making the batch isn't part of it."""
        batch, report, own = self._draw(), None, self.preconditioner
        due = None if own is None else own.pipeline.timetable.due(own.next_step)
        begun, marks = time.thread_time(), [time.perf_counter()]
        self.optimizer.zero_grad()
        marks.append(time.perf_counter())
        loss = self._workload.loss(self.model, batch)
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        if own is not None:
            report = own.step()
        marks.append(time.perf_counter())
        self.optimizer.step()
        marks.append(time.perf_counter())
        cpu = time.thread_time() - begun
        self.loss = loss.detach()
        seconds = {name: after - before for name, (before, after) in zip(PARTS, pairwise(marks), strict=True)}
        if report is None or due is None:
            return TimedStep(seconds, cpu, {})
        holds = (report.adopted, due.reducing, due.folding, True)
        kind = next(kind for kind, held in zip(KINDS, holds, strict=True) if held)
        return TimedStep(seconds, cpu, report.phase_seconds, kind)

    def flops(self, steps: int) -> dict[str, int]:
        """Counts the operations of a step in which nothing is due: the least of so many steps, by part."""
        passes, applied = [], []
        for _ in range(steps):
            batch = self._draw()
            self.optimizer.zero_grad()
            with counting() as counted:
                self._workload.loss(self.model, batch).backward()
            passes.append(counted.get_total_flops())
            if self.preconditioner is not None:
                with counting() as counted:
                    self.preconditioner.step()
                applied.append(counted.get_total_flops())
            self.optimizer.step()
        return {"forward_and_backward": min(passes), "preconditioner": min(applied, default=0)}
