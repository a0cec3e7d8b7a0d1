"""What a run sends, in bytes by purpose: the purposes of `kfdist_bytes_total`, and the gradients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.nn.parameter import UninitializedParameter

from kfdist.capture.gradient_norms import few
from kfdist.comm.background import HEADER_COLUMNS
from kfdist.config import Config
from kfdist.forecast.inversion_costs import Costs
from kfdist.forecast.rank_memory import bytes_of, result_bytes, scale_bytes, state_bytes
from kfdist.forecast.rehearsal import Rehearsal
from kfdist.policies.adoption import AdoptionLedger, encode_table
from kfdist.policies.schedule import Schedule
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.runtime.plan.planner import Plan

PURPOSES: Mapping[str, str] = {
    "gradients": "reduced over the ranks; each contributes them once a step",
    "statistics": "reduced over the ranks before inversions",
    "jobs": "from ranks to owners",
    "results": "from owners to ranks",
    "snapshots": "results, from one rank to all others",
    "table": "what the ranks agree on, once a step; waits add to it",
}

RINGS = frozenset({"gradients", "statistics", "table"})
"""Purposes whose bytes are reduced: on a ring each rank sends 2 (W - 1) / W times what it contributes."""

_NOISE_HEAD = 4
"""Numbers of a measurement of the noise scale, beside a few of each parameter."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one purpose.

    Attributes:
        purpose: A key of `PURPOSES`.
        total: Over all ranks, in the steps that were asked for; None if it isn't known.
        wire: What a rank sends of it on the network: a ring's part, or its share of what goes to one receiver each.
    """

    purpose: str
    total: float | None
    wire: float | None


class TrafficForecast:
    """Counts what is due in some steps, by the schedule that a run begins with.

    Args:
        config: What is to run.
        plan: Of its model.
        rehearsal: Of the plan.
        costs: Of inversions; they have the sizes of results.
    """

    def __init__(self, config: Config, plan: Plan, rehearsal: Rehearsal, costs: Costs) -> None:
        self._config = config
        self._plan = plan
        self._rehearsal = rehearsal
        self._costs = costs
        self._lazy = any(isinstance(each, UninitializedParameter) for each in plan.model.parameters())
        self._schedule = plan.settings.schedules(len(plan.groups), together=plan.together)[0]

    def per_step(self) -> list[Traffic]:
        """Returns the bytes of an average step, once the first one, at which all is due, is over."""
        period = self._schedule.inverse_period
        begun, later = self.over(1 + period), self.over(1 + 3 * period)
        return [
            Traffic(one.purpose, _slope(one.total, two.total, 2 * period), _slope(one.wire, two.wire, 2 * period))
            for one, two in zip(begun, later, strict=True)
        ]

    def over(self, steps: int) -> list[Traffic]:
        """Returns the bytes of a run's first steps, if each inversion is adopted."""
        ranks, local = self._plan.world_size, self._config.cluster.link == "local"
        groups = [group for group in self._plan.groups if not group.own]
        results = sum(self._jobs(group, steps) * result_bytes(group, self._costs) for group in groups)
        jobs = self._job_bytes(groups, steps)
        gradients, statistics = self._gradients(steps), self._statistics(steps)
        reduced = {
            "gradients": None if gradients is None else ranks * gradients,
            "statistics": None if statistics is None else ranks * statistics,
            "table": float(ranks * self._table(groups, steps)),
        }
        found = [
            Traffic(purpose, total, None if total is None else total / ranks * 2 * (ranks - 1) / ranks)
            for purpose, total in reduced.items()
        ]
        # Each result travels once from the rank that asked for it, and on to all others.
        found += [
            Traffic("jobs", jobs, 0.0 if local else (None if jobs is None else jobs / ranks)),
            Traffic("results", results, 0.0 if local else results / ranks),
            Traffic("snapshots", results, results * (ranks - 1) / ranks),
        ]
        order = list(PURPOSES)
        return sorted(found, key=lambda each: order.index(each.purpose))

    def _gradients(self, steps: int) -> float | None:
        """Returns what one rank contributes; None while lazy parameters have no sizes."""
        if self._plan.world_size == 1:
            return 0.0
        if self._lazy:
            return None
        return float(bytes_of(each for each in self._plan.model.parameters() if each.requires_grad) * steps)

    def _statistics(self, steps: int) -> float | None:
        """Returns what one rank contributes; None while lazy parameters have no sizes, or if no step was rehearsed."""
        sent, rehearsal = 0.0, self._rehearsal
        if self._lazy or not rehearsal.inverting and self._plan.groups:
            return None
        for group in self._plan.groups:
            inversions = self._inversions(group, steps)
            sent += inversions * rehearsal.inverting[group.name].reduced
            if group.name in rehearsal.updating:
                sent += (self._jobs(group, steps) - inversions) * rehearsal.updating[group.name].reduced
        foldings = {
            group.name: self._schedule.count_until(group.index, steps - 1, self._schedule.factor_period)
            for group in self._plan.groups
        }
        sent += sum(foldings[name] * size for name, size in scale_bytes(self._plan.groups).items())
        return sent + self._noise(steps)

    def _noise(self, steps: int) -> int:
        if self._plan.world_size == 1 and self._config.data.micro_batches < 2:
            return 0
        numbers = _NOISE_HEAD + sum(few(parameter).numel() for parameter in self._plan.model.parameters())
        return 8 * numbers * self._schedule.count_until(0, steps - 1, self._schedule.factor_period)

    def _jobs(self, group: BlockGroup, steps: int) -> int:
        period = group.inverter.update_period(self._schedule.factor_period, self._schedule.inverse_period)
        return self._schedule.count_until(group.index, steps - 1, period)

    def _inversions(self, group: BlockGroup, steps: int) -> int:
        """Counts the jobs with dense sums: all but those of online methods in between."""
        if not group.inverter.online:
            return self._jobs(group, steps)
        return self._schedule.count_until(group.index, steps - 1, self._schedule.inverse_period)

    def _job_bytes(self, groups: Sequence[BlockGroup], steps: int) -> float | None:
        sent, rehearsal = 0.0, self._rehearsal
        if not rehearsal.inverting and groups:
            return None
        for group in groups:
            jobs = self._jobs(group, steps)
            inversions = self._inversions(group, steps)
            between = rehearsal.updating.get(group.name)
            sent += inversions * rehearsal.inverting[group.name].job
            sent += (jobs - inversions) * between.job if between is not None else 0
            sent += max(jobs - 1, 0) * state_bytes(group, self._costs)
        return sent

    def _table(self, groups: Sequence[BlockGroup], steps: int) -> int:
        columns = len(encode_table([AdoptionLedger()] * len(groups), revision=None, stop=False))
        jobs = sum(self._jobs(group, steps) for group in groups)
        return 8 * ((columns + self._rehearsal.biases) * steps + jobs * HEADER_COLUMNS)


def _slope(begun: float | None, later: float | None, steps: int) -> float | None:
    return None if begun is None or later is None else (later - begun) / steps


def schedule_of(plan: Plan) -> Schedule:
    """Returns the schedule that a run begins with."""
    return plan.settings.schedules(len(plan.groups), together=plan.together)[0]
