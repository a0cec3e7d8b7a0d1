"""`history.jsonl`: what a report draws over a run's steps, in a size that grows with the logarithm of their number.

Each line is an object with `event`, `time` and `step`:

    start     `start`, the number of this start; `blocks`, their names in order; `methods`, one for each
    window    the steps since the last window of this start. `staleness`: the largest of each block in it, null where
              it has no inverse yet. `periods`: each block's steps between two inverses, at its end. `phases` and
              `inversions` (by method, over all ranks): `Durations` of it.
              `totals`: since the start, over all ranks. `diagnostics`: by block, of the inversion in use.
              `step_lengths`, `graft_ratios`: by group, of a step of it, as far as it has them
    spectrum  `factors`: by block and factor, `size` and `points`, (index from 1, eigenvalue) of the inverse in use;
              EKFAC's are "scales", of the whole block

Windows are `log_period` steps long at first; after 256 of them they are twice as long, after 256 more twice as that.
"""

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kfdist.runtime.settings import StepReport
from kfdist.telemetry.durations import Durations
from kfdist.training.reporting import MetricsLog
from kfdist.training.run_state import Training
from kfdist.types import GroupName

_LOG = logging.getLogger(__name__)

WINDOWS_PER_LENGTH = 256
SPECTRUM_GROWTH = 1.1
"""A spectrum is written at a checkpoint whose step is at least this many times the last one's."""

_POINTS = 24
_SUMMED = ("courier_restarts", "samples_lost", "nonfinite_drops")


def window_length(step: int, log_period: int) -> int:
    """Returns how many steps a window at `step` spans."""
    doublings = math.floor(math.log2(max(step / (WINDOWS_PER_LENGTH * log_period), 1)))
    return log_period * 2**doublings


class History:
    """Writes `history.jsonl`, of what all ranks measured; the seconds of phases are of the rank that writes it.

    Args:
        training: What is trained with.
        log: The file; on most ranks there is none.
    """

    def __init__(self, training: Training, log: MetricsLog) -> None:
        self._training = training
        self._log = log
        self._writes = log.writes
        self._steps = self._unwritten = 0
        self._spectrum_step = 0.0
        self._phases: defaultdict[str, Durations] = defaultdict(Durations)
        self._staleness: dict[GroupName, int] = {}

    def start(self, start: int, step: int) -> None:
        """Begins a start's part of the file."""
        groups = self._training.preconditioner.groups
        methods = {block.name: group.inverter.name for group in groups for block in group.blocks}
        self._log.write("start", step=step, start=start, blocks=list(methods), methods=list(methods.values()))

    def count(self, report: StepReport, *, total: float, waited: float) -> None:
        """Counts a step that was done.

        Args:
            report: Of the preconditioner.
            total: Host seconds of the whole step.
            waited: Those of them that were waited for examples.
        """
        self._steps += 1
        self._unwritten += 1
        if not self._writes:
            return
        for phase, seconds in {**report.phase_seconds, "input": waited, "total": total}.items():
            self._phases[phase].add(seconds)
        # By group: in every step, a thousand blocks would be felt.
        staleness = self._training.preconditioner.pipeline.staleness()
        worst = map(max, staleness.values(), self._staleness.values()) if self._staleness else staleness.values()
        self._staleness = dict(zip(staleness, worst, strict=True))

    def write_if_due(self, step: int, *, ended: bool = False) -> None:
        """Writes the window that ends at `step`, if one does. All ranks must call it, at the same step.

        Args:
            step: Steps that are done.
            ended: Whether it is the last of this start.
        """
        if self._unwritten and (ended or step % window_length(step, self._training.config.run.log_period) == 0):
            self._write(step)

    def _write(self, step: int) -> None:
        training, preconditioner = self._training, self._training.preconditioner
        own, counters = preconditioner.counters(), preconditioner.pipeline.counters
        inversions = {method: seconds.to_json() for method, seconds in counters.take_inversions().items()}
        ranks = training.communicator.all_gather_json({"counters": own, "inversions": inversions})
        self._unwritten = 0
        if not self._writes:
            return
        inverses = preconditioner.inverses()
        self._log.write(
            "window",
            step=step,
            staleness=[
                self._staleness[group.name] if block.name in inverses else None
                for group in preconditioner.groups
                for block in group.blocks
            ],
            periods=[
                preconditioner.pipeline.timetable.update_period(track, step - 1)
                for track in preconditioner.pipeline.tracks
                for _ in track.group.blocks
            ],
            phases={phase: seconds.to_json() for phase, seconds in self._phases.items()},
            inversions=_merged(rank["inversions"] for rank in ranks),
            totals=self._totals(own, [rank["counters"] for rank in ranks]),
            diagnostics={block: _rounded(found) for block, found in preconditioner.diagnostics().items()},
            damping=preconditioner.pipeline.in_force.damping(step - 1) if preconditioner.groups else None,
            noise_scale=preconditioner.noise_scale(),
            step_lengths=_rounded(preconditioner.pipeline.lengths.latest()),
            graft_ratios=_rounded(preconditioner.pipeline.grafts.latest()),
            graft_replacements=preconditioner.pipeline.grafts.replaced(),
        )
        self._phases.clear()
        self._staleness.clear()

    def _totals(self, own: Mapping[str, Any], ranks: list[Mapping[str, Any]]) -> dict[str, Any]:
        moved, resubmissions = Counter[str](), Counter[str]()
        moved["gradients"] = self._training.reducer.bytes_per_step * self._steps * len(ranks) if len(ranks) > 1 else 0
        for counters in ranks:
            moved.update(counters["bytes"])
            resubmissions.update(counters["resubmissions"])
        return {
            "steps": self._steps,
            "bytes": dict(moved),
            "resubmissions": dict(resubmissions),
            **{name: sum(counters[name] for counters in ranks) for name in _SUMMED},
            **{name: own[name] for name in ("adoptions", "fallbacks", "failures", "degraded")},
        }

    def write_spectra(self, step: int) -> None:
        """Writes the eigenvalues that the inverses in use have, for a checkpoint; seldom in long runs."""
        if not self._writes or step < self._spectrum_step * SPECTRUM_GROWTH:
            return
        factors, faults = {}, {}
        inverses = [
            (block, inverse, track.memories[block])
            for track in self._training.preconditioner.pipeline.tracks
            for block, inverse in track.snapshot.preconditioners.items()
        ]
        for block, inverse, memory in inverses:
            try:
                found = {factor: _points(values, size) for factor, (values, size) in inverse.spectra(memory).items()}
            except RuntimeError as error:  # a record is no reason to end a run
                faults[block] = error
                continue
            if found:
                factors[block] = found
        if faults:
            block, error = next(iter(faults.items()))
            _LOG.warning("history.jsonl lacks spectra of %d blocks, such as %s: %s", len(faults), block, error)
        if factors:
            self._spectrum_step = step
            self._log.write("spectrum", step=step, factors=factors)


def _merged(ranks: Any) -> dict[str, Any]:
    merged: defaultdict[str, Durations] = defaultdict(Durations)
    for rank in ranks:
        for method, seconds in rank.items():
            merged[method].merge(Durations.from_json(seconds))
    return {method: seconds.to_json() for method, seconds in merged.items()}


def _points(values: Tensor, size: int) -> dict[str, Any]:
    """Picks a few of the eigenvalues, as many of the first as of each later decade."""
    found = values.detach().double().flatten().sort(descending=True).values.tolist()
    ratio = len(found) ** (1 / max(_POINTS - 1, 1))
    indices = sorted({min(round(ratio**n), len(found)) for n in range(_POINTS)}) if found else []
    return {"size": size, "points": [(index, _short(found[index - 1])) for index in indices]}


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: _short(value) for name, value in values.items()}


def _short(value: float) -> float:
    return float(f"{value:.4g}")
