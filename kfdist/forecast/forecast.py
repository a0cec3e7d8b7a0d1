"""Everything that is told of a run before it starts, put together."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kfdist.config import Config
from kfdist.curvature.auto import MeasuredCosts, measure_costs
from kfdist.forecast.earlier_run import EarlierRun, read_earlier_run
from kfdist.forecast.inversion_costs import Costs, measure
from kfdist.forecast.outline import Given, make_outline
from kfdist.forecast.owner_queue import Ages, deal, play
from kfdist.forecast.rank_memory import Line, rank_lines
from kfdist.forecast.rehearsal import rehearse
from kfdist.forecast.step_time import StepTime, step_times
from kfdist.forecast.traffic import RINGS, Traffic, TrafficForecast, schedule_of
from kfdist.forecast.trial_steps import try_steps
from kfdist.policies.advice import batch_advice, owner_advice, shortest_period
from kfdist.policies.staleness import FixedLag, usual_delay
from kfdist.runtime.plan.capacity import largest_inversion
from kfdist.runtime.plan.coverage import Coverage
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.runtime.plan.planner import Plan, needs_costs
from kfdist.training.method import make_method, plan_of
from kfdist.training.run_directory import read_costs

_MOST_OWNERS = 64
"""Of how many owners staleness is tried at most."""


@dataclass(frozen=True, kw_only=True)
class BlockForecast:
    """What one block is and takes.

    Attributes:
        name: Its name.
        method: What inverts it.
        d_out: Outputs.
        d_in: Inputs, with the bias.
        matrices: Of a grouped convolution or of experts.
        seconds: How long its inversion takes here; None where the ranks do it at once.
        owner: The number of the owner, or of the rank with a local link; None where all ranks do it.
        note: What there is to say of the method's choice, or of what isn't measured.
    """

    name: str
    method: str
    d_out: int
    d_in: int
    matrices: int
    seconds: float | None
    owner: int | None
    note: str


@dataclass(frozen=True, kw_only=True)
class OwnerForecast:
    """What one owner has to do.

    Attributes:
        groups: How many groups it inverts.
        seconds: Its inversions in one inverse period.
        bytes: Memory of its largest inversion, beside what Python and torch take.
    """

    groups: int
    seconds: float
    bytes: int


@dataclass(frozen=True, kw_only=True)
class AgeForecast:
    """How old inverses get at one step time.

    Attributes:
        step_time: The step time.
        ages: What follows; None where the step time isn't known, or nothing is inverted.
    """

    step_time: StepTime
    ages: Ages | None


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run will take.

    Attributes:
        title: The run in a line.
        remarks: What is assumed or couldn't be found out, and why.
        coverage: As `Preconditioner.coverage()` would say after the first step.
        blocks: Each of them.
        memory: Of a rank.
        traffic: Of an average step.
        owners: Those of the run; ranks with a local link.
        by_method: Seconds of one inverse period by method, on this machine's CPU.
        threads: Of each inversion.
        costs: What the inversions are counted by.
        ages: By step time.
        advice: What to do about it.
    """

    title: str
    remarks: tuple[str, ...]
    coverage: Coverage
    blocks: tuple[BlockForecast, ...]
    memory: tuple[Line, ...]
    traffic: tuple[Traffic, ...]
    owners: tuple[OwnerForecast, ...]
    by_method: Mapping[str, float]
    threads: int
    costs: Costs
    ages: tuple[AgeForecast, ...]
    advice: tuple[str, ...]

    @property
    def lasting_bytes(self) -> int:
        """What a rank holds all the time, as far as it is known."""
        return sum(line.bytes or 0 for line in self.memory if not line.passing)

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        rows = [
            {"parameter": row.parameter, "elements": row.elements, "frozen": row.frozen}
            | {"block": row.block, "method": row.method}
            | {"reason": ": ".join(filter(None, (row.reason, row.inversion)))}
            for row in self.coverage.rows
        ]
        return {
            "run": self.title,
            "remarks": list(self.remarks),
            "coverage": {
                "trained": self.coverage.trained,
                "frozen": self.coverage.frozen,
                "share": self.coverage.share,
                "share_in_part": self.coverage.share_in_part,
                "rows": rows,
            },
            "blocks": [asdict(block) for block in self.blocks],
            "memory": {"lines": [asdict(line) for line in self.memory], "lasting_bytes": self.lasting_bytes},
            "bytes_per_step": [asdict(each) | {"ring": each.purpose in RINGS} for each in self.traffic],
            "owners": [asdict(owner) for owner in self.owners],
            "inversion_seconds": {"by_method": dict(self.by_method), "threads": self.threads},
            "staleness": [
                {**asdict(each.step_time), "ages": None if each.ages is None else asdict(each.ages)}
                for each in self.ages
            ],
            "advice": list(self.advice),
        }


def make_forecast(
    config: Config,
    given: Given,
    *,
    step_seconds: float | None = None,
    from_run: Path | None = None,
    gpus: Sequence[str] = (),
    costs: Costs | None = None,
) -> Forecast:
    """Finds out what a run will take. Nothing is started, and nothing is written.

    Args:
        config: What is to run.
        given: What is said of the data.
        step_seconds: How long a step takes; None if that isn't known.
        from_run: The directory of an earlier run, whose measurements count; None without one.
        gpus: Names of GPUs that ranks might have.
        costs: What inversions of this plan's groups take here; measured if None.

    Raises:
        ConfigError: A value is wrong.
    """
    earlier = None if from_run is None else read_earlier_run(from_run)
    outline = make_outline(config, given)
    world = config.cluster.workers
    plan = plan_of(config, outline.model, world_size=world, costs=_costs_for_auto(config, from_run))
    rehearsal = rehearse(plan, outline, examples=config.data.batch_size, micro_batches=config.data.micro_batches)
    costs = costs or measure(plan.groups, threads=config.cluster.threads, limits=rehearsal.limits)
    sent = [group for group in plan.groups if not group.own]
    owner_of = _owner_of(config, sent)
    times = step_times(
        config,
        rehearsal,
        costs,
        given=step_seconds,
        earlier=earlier,
        gpus=gpus,
        here=_gpus_here(config),
        trial=partial(try_steps, config, outline, plan, costs),
    )
    ages = tuple(_ages(config, plan, sent, owner_of, costs, each) for each in times)
    remarks = [*outline.remarks]
    if rehearsal.fault:
        remarks.append(
            f"a step can't be rehearsed without values ({rehearsal.fault}): activations, what isn't measured and bytes "
            "of statistics and jobs aren't known. If it isn't for want of values, the run itself fails likewise"
        )
    if config.cluster.bundle.gpus:
        remarks.append("owners have a share of a GPU, of which there are no figures: inversions are as on this CPU")
    if config.preconditioner.inverse_period_epochs:
        remarks.append("inverse_period changes with the epochs; all figures are of the first one")
    smaller = [group.name for group in sent if not costs.is_measured(group)]
    if smaller:
        remarks.append(
            f"inversion seconds of {len(smaller)} of {len(sent)} groups are in proportion to those of smaller jobs, "
            "which were done here"
        )
    cut = sorted({each.inverter.name for each in plan.groups if each.inverter.settings().get("direction_error")})
    if cut:
        remarks.append(
            f"inverses of {', '.join(cut)} are taken to have as many eigenpairs as they may: how many direction_error "
            "cuts off, and where rank allows too few for it, is known once they are there (`kfdist status` says it)"
        )
    return Forecast(
        title=_title(config),
        remarks=tuple(remarks),
        coverage=rehearsal.coverage,
        blocks=_blocks(plan, rehearsal.coverage, costs, owner_of),
        memory=tuple(rank_lines(config, plan, rehearsal, costs)),
        traffic=tuple(TrafficForecast(config, plan, rehearsal, costs).per_step()),
        owners=_owners(config, plan, sent, owner_of, costs),
        by_method=_by_method(plan, sent, costs),
        threads=config.cluster.threads,
        costs=costs,
        ages=ages,
        advice=tuple(_advice(config, plan, sent, costs, ages, earlier)),
    )


def _gpus_here(config: Config) -> list[str]:
    if config.run.device == "cpu" or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _title(config: Config) -> str:
    cluster = config.cluster
    inverts = "" if not config.preconditioner.inverts else f", {cluster.owners} owners"
    who = ", inverted by the ranks" if cluster.link == "local" and config.preconditioner.inverts else inverts
    return (
        f"{config.run.name}: {config.model.name} on {config.data.name}, {config.preconditioner.described}, "
        f"{cluster.workers} ranks x {config.data.batch_size} examples{who}"
    )


def _costs_for_auto(config: Config, from_run: Path | None) -> MeasuredCosts | None:
    """Returns what "auto" chooses by: what an earlier run kept, else what this machine takes."""
    if not needs_costs(make_method(config.preconditioner)):
        return None
    kept = None if from_run is None else read_costs(from_run)
    return kept or measure_costs()


def _owner_of(config: Config, sent: Sequence[BlockGroup]) -> dict[str, int]:
    """Returns who inverts each group: an owner, or with a local link the rank that ships it."""
    if config.cluster.link == "local":
        return {group.name: group.courier_rank for group in sent}
    return deal(sent, config.cluster.owners, config.cluster.assignment) if sent else {}


def _ages(
    config: Config,
    plan: Plan,
    sent: Sequence[BlockGroup],
    owner_of: Mapping[str, int],
    costs: Costs,
    step_time: StepTime,
) -> AgeForecast:
    """Plays the owners' queues, the second time with what their work leaves of this machine's processors to ranks."""
    ages = _play(plan, sent, owner_of, costs, step_time)
    busy = 0.0 if ages is None or config.cluster.link == "local" else sum(ages.busy)
    shared = step_time.beside(config.cluster.threads * (config.cluster.workers + busy))
    if shared.seconds != step_time.seconds:
        ages = _play(plan, sent, owner_of, costs, shared)
    return AgeForecast(step_time=shared, ages=ages)


def _play(
    plan: Plan, sent: Sequence[BlockGroup], owner_of: Mapping[str, int], costs: Costs, step_time: StepTime
) -> Ages | None:
    if step_time.seconds is None or not sent:
        return None
    delay = usual_delay(ranks=plan.world_size, gpu=step_time.gpu)
    return play(sent, schedule_of(plan), owner_of, costs.seconds, step_time.seconds, delay)


def _blocks(plan: Plan, coverage: Coverage, costs: Costs, owner_of: Mapping[str, int]) -> tuple[BlockForecast, ...]:
    notes = {row.block: ": ".join(filter(None, (row.reason, row.inversion))) for row in coverage.rows if row.block}
    return tuple(
        BlockForecast(
            name=block.name,
            method=group.inverter.name,
            d_out=block.shape.d_out,
            d_in=block.shape.d_in,
            matrices=block.shape.groups,
            seconds=None if group.own else costs.seconds(group) / len(group.blocks),
            owner=owner_of.get(group.name),
            note=notes.get(block.name, ""),
        )
        for group in plan.groups
        for block in group.blocks
    )


def _owners(
    config: Config, plan: Plan, sent: Sequence[BlockGroup], owner_of: Mapping[str, int], costs: Costs
) -> tuple[OwnerForecast, ...]:
    count = config.cluster.workers if config.cluster.link == "local" else config.cluster.owners
    dealt = [[group for group in sent if owner_of[group.name] == owner] for owner in range(count if sent else 0)]
    return tuple(
        OwnerForecast(
            groups=len(groups),
            seconds=sum(_seconds_of_period(plan, group, costs) for group in groups),
            bytes=largest_inversion(groups),
        )
        for groups in dealt
    )


def _seconds_of_period(plan: Plan, group: BlockGroup, costs: Costs) -> float:
    schedule = schedule_of(plan)
    updates = schedule.inverse_period / group.inverter.update_period(schedule.factor_period, schedule.inverse_period)
    return updates * costs.seconds(group)


def _by_method(plan: Plan, sent: Sequence[BlockGroup], costs: Costs) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for group in sent:
        found[group.inverter.name] += _seconds_of_period(plan, group, costs)
    return dict(found)


def _advice(
    config: Config,
    plan: Plan,
    sent: Sequence[BlockGroup],
    costs: Costs,
    ages: Sequence[AgeForecast],
    earlier: EarlierRun | None,
) -> list[str]:
    schedule, owners = schedule_of(plan), config.cluster.owners
    said = []
    seconds = ages[0].step_time.seconds
    delay = usual_delay(ranks=plan.world_size, gpu=ages[0].step_time.gpu)
    if isinstance(plan.settings.adoption, FixedLag) and ages[0].ages is not None:
        said += _lag_advice(plan.settings.adoption.lag, ages[0].ages, ages[0].step_time)
    elif sent and config.cluster.link == "service" and seconds is not None:
        counts = {*range(1, min(len(sent), _MOST_OWNERS) + 1), owners}
        found = {}
        for count in sorted(counts):
            dealt = deal(sent, count, config.cluster.assignment)
            found[count] = play(sent, schedule, dealt, costs.seconds, seconds, delay).steps_by_period
        bounds = config.preconditioner.staleness
        bound = bounds.soft_bound if bounds.soft_bound is not None else bounds.hard_bound
        said += owner_advice(owners, found, bound, delay=delay)
    batch = config.cluster.workers * config.data.batch_size
    noise = None if earlier is None else earlier.noise_scale
    inverting = owners if config.preconditioner.inverts and config.cluster.link == "service" else 0
    periods = [group.inverter.update_period(schedule.factor_period, schedule.inverse_period) for group in sent]
    period, key = shortest_period(config.preconditioner.model_dump(), periods)
    return said + batch_advice(batch, noise, owners=inverting, period=period, period_key=key)


def _lag_advice(lag: int, ages: Ages, step_time: StepTime) -> list[str]:
    assert step_time.seconds is not None, "ages follow from a step time"
    if ages.delay_steps <= lag:
        return [f"Inversions take at most {ages.delay_steps} steps, within the lag of {lag}: no step waits for one."]
    waits = (ages.delay_steps - lag) * step_time.seconds
    return [
        f"Inversions take up to {ages.delay_steps} steps, above the lag of {lag}: the steps that adopt wait up to "
        f"{waits:.2g} s. More owners, a larger preconditioner.lag or a longer inverse_period avoid that."
    ]
