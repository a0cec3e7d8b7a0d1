"""One step of a plan on the meta device: what it would measure, keep and send, found by the code that does it.

Nothing has values there, so nothing is computed; shapes are those of a run. What depends on values can't be rehearsed,
such as a model that branches on its input: then the fault is told, and the figures that need a forward are unknown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from kfdist.comm.communicator import Communicator
from kfdist.curvature.averages import BatchStatistics
from kfdist.curvature.jobs import encode_job
from kfdist.forecast.outline import META, Outline, in_a_line
from kfdist.linalg.arithmetic import plain_arithmetic
from kfdist.runtime.assembly import make_capture
from kfdist.runtime.invert.departures import job_record
from kfdist.runtime.invert.own import invert_own
from kfdist.runtime.invert.shipping import reduced_tensors
from kfdist.runtime.plan.coverage import Coverage
from kfdist.runtime.plan.planner import Plan
from kfdist.runtime.plan.timetable import Due, Timetable
from kfdist.runtime.reduce.reducer import Reduction, StatisticsReducer
from kfdist.runtime.track import Track
from kfdist.torch_internals import storage_id
from kfdist.types import BlockName, GroupName
from kfdist.wire.records import RecordTree, tensor_fields

_BACKWARD = 2.0
"""Operations of a backward, compared with its forward's."""


@dataclass(frozen=True, kw_only=True)
class GroupBytes:
    """What a group sends for one job, in bytes.

    Attributes:
        reduced: What each rank contributes to the reduction before it.
        job: The statistics of the job that goes to an owner; 0 where the ranks invert it themselves.
        limits: Of a method that takes rows of single examples, the `examples` that there are in a step, and the
            `columns` that they have: its settings by name, which may ask for more.
    """

    reduced: int
    job: int
    limits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What one step showed.

    Attributes:
        coverage: What is preconditioned, with what turned out not to be measured.
        fault: Why a forward, and what follows it, couldn't be rehearsed; empty if it could.
        flops: Floating-point operations of a rank's forwards and backwards in a step; None if not known.
        activations: Bytes that one micro-batch keeps for its backward, in float32; None if not known.
        measured: Bytes of the batch's own statistics, where all blocks are due at once; None if not known.
        inverting: By group, what a job sends at an inversion; empty if not known.
        updating: By group of an online method, what its jobs in between send.
        own: By group that the ranks invert themselves, the bytes of its inverses.
        biases: How many biases the ranks agree on.
    """

    coverage: Coverage
    fault: str = ""
    flops: float | None = None
    activations: int | None = None
    measured: int | None = None
    inverting: Mapping[GroupName, GroupBytes] = field(default_factory=dict)
    updating: Mapping[GroupName, GroupBytes] = field(default_factory=dict)
    own: Mapping[GroupName, int] = field(default_factory=dict)
    biases: int = 0

    @property
    def limits(self) -> dict[GroupName, Mapping[str, int]]:
        """What there is of examples and their rows, by group, as far as it is known."""
        return {name: sent.limits for name, sent in self.inverting.items() if sent.limits}


def rehearse(plan: Plan, outline: Outline, *, examples: int, micro_batches: int) -> Rehearsal:
    """Does one step, the first, at which all blocks are due.

    Args:
        plan: Of the outline's model.
        outline: The model and its examples.
        examples: Of a rank and step.
        micro_batches: Parts in which they are taken.
    """
    size = examples // micro_batches
    try:
        forward_flops, activations = _plain_forward(outline, size)
        return _measured_step(
            plan,
            outline,
            size,
            flops=forward_flops * (1 + _BACKWARD) * micro_batches,
            activations=activations,
        )
    except Exception as error:  # of the user's code, or an operation that needs values
        return Rehearsal(coverage=plan.coverage, fault=in_a_line(error))


def _plain_forward(outline: Outline, size: int) -> tuple[float, int]:
    """Returns the operations of a forward, and the bytes that it keeps for a backward."""
    model, (inputs, _) = outline.model.train(), outline.example.batch(size)
    lasting = {storage_id(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(storage_id(tensor.untyped_storage()), tensor)
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        output = model(inputs)
    del output
    saved = [tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in lasting]
    return float(counter.get_total_flops()), sum(saved)


def _measured_step(plan: Plan, outline: Outline, size: int, *, flops: float, activations: int) -> Rehearsal:
    ranks = _Ranks(plan.world_size)
    # A rank has only what it ships itself: here it is all of it.
    groups = [replace(group, courier_rank=0) for group in plan.groups]
    tracks = [Track.of(group, queued=False) for group in groups]
    schedules = plan.settings.schedules(len(tracks), together=plan.together)
    timetable = Timetable(schedules, tracks, seed=plan.settings.seed, rank=0, world_size=plan.world_size)
    capture = make_capture(plan, None, 0)
    try:
        capture.arm(timetable.requests(0, calibrating=range(len(tracks))))
        _forward_and_backward(outline, size, capture.observe if plan.settings.fisher != "empirical" else None)
        batches = capture.drain()
        capture.biases.settle(capture.biases.seen)
        coverage = plan.coverage.without_biases(plan.blocks, capture.biases.left_out)
        coverage = coverage.with_inversions({}, capture.unmeasured, capture.unseen)
    finally:
        capture.close()
        for parameter in outline.model.parameters():
            parameter.grad = None
    measured = sum(map(_batch_bytes, batches.values()))
    with plain_arithmetic(META):
        reducer = StatisticsReducer(groups, plan.settings, timetable, ranks, META)
        reducer.fold(timetable.due(0), batches, None)
        inverting, own = {}, {}
        for track in tracks:
            inverting[track.group.name] = _send(reducer, track, 0, batches, plan.world_size)
            if track.group.own:
                own[track.group.name] = _own_bytes(reducer, track, batches, plan.settings.seed)
        between = {track: _update_between(timetable, track) for track in tracks if track.group.inverter.online}
        updating = {
            track.group.name: _send(reducer, track, step, batches, plan.world_size)
            for track, step in between.items()
            if step is not None
        }
    return Rehearsal(
        coverage=coverage,
        flops=flops,
        activations=activations,
        measured=measured,
        inverting=inverting,
        updating=updating,
        own=own,
        biases=len(capture.biases.seen),
    )


def _forward_and_backward(outline: Outline, size: int, observe: object) -> None:
    example, model = outline.example, outline.model
    inputs, targets = example.batch(size)
    output = model(inputs)
    if example.objective is None:
        loss = output.float().square().mean()
    else:
        loss = example.objective.loss(output, targets)
        observation = example.objective.observation(targets)
        if callable(observe) and observation is not None:
            observe(output, **observation)
    loss.backward()


def _update_between(timetable: Timetable, track: Track) -> int | None:
    """Returns a step at which an online group has a job and no inversion; None if there is none."""
    steps = range(1, 2 * timetable.inverse_period(0))
    return next((s for s in steps if timetable.updates(track, s) and not timetable.inverts(track, s)), None)


def _send(
    reducer: StatisticsReducer,
    track: Track,
    step: int,
    batches: Mapping[BlockName, BatchStatistics],
    world_size: int,
) -> GroupBytes:
    """Reduces one group, and returns what that sends and what its job takes."""
    before = reducer.bytes_sent
    reduction = _reduce(reducer, track, step, batches)
    return GroupBytes(
        reduced=reducer.bytes_sent - before,
        job=0 if track.group.own else _job_bytes(track, reduction),
        limits=_limits(reduction, batches, world_size) if reduction.samples else {},
    )


def _limits(reduction: Reduction, batches: Mapping[BlockName, BatchStatistics], world_size: int) -> dict[str, int]:
    """Returns how many examples with rows there are, and how many rows each has, in the blocks of a group."""
    own = [batches[name].samples for name in reduction.samples if name in batches]
    return {
        "examples": world_size * max((len(rows.weight) for rows in own if rows is not None), default=0),
        "columns": max(samples.a.shape[2] for samples in reduction.samples.values()),
    }


def _reduce(
    reducer: StatisticsReducer, track: Track, step: int, batches: Mapping[BlockName, BatchStatistics]
) -> Reduction:
    return reducer.reduce(Due(step=step, folding=(), reducing=(track,)), batches, None)


def _own_bytes(
    reducer: StatisticsReducer, track: Track, batches: Mapping[BlockName, BatchStatistics], seed: int
) -> int:
    made = invert_own(_reduce(reducer, track, 0, batches), seed=seed)
    inverses = [inverse for each in made.values() for inverse in each.preconditioners.values()]
    return sum(tensor.nbytes for inverse in inverses for tensor in tensor_fields(inverse).values())


def _job_bytes(track: Track, reduction: Reduction) -> int:
    group = track.group
    tensors = reduced_tensors([group], reduction)
    records = {name: job_record(group.inverter.statistic, of_block) for name, of_block in tensors.items()}
    if not records:
        return 0
    emptied, content = {}, 0
    for name, record in records.items():
        content += sum(value.nbytes for value in record["fields"].values() if isinstance(value, Tensor))
        emptied[name] = _emptied(record)
    seeds = dict.fromkeys(records, 2**62)
    shell = encode_job(inverter=group.inverter, statistics=emptied, damping=1e-3, seeds=seeds, previous={}, threads=1)
    return len(shell) + content


def _emptied(record: RecordTree) -> RecordTree:
    """Returns a record whose tensors have no elements: what travels beside them."""
    fields = record["fields"].items()
    return {
        **record,
        "fields": {
            name: torch.empty(0, dtype=value.dtype, device="cpu") if isinstance(value, Tensor) else value
            for name, value in fields
        },
    }


def _batch_bytes(batch: BatchStatistics) -> int:
    rows: Sequence[Tensor] = () if batch.samples is None else (batch.samples.a, batch.samples.g)
    return sum(tensor.nbytes for tensor in (*batch.sums.values(), *batch.rows.values(), *rows))


class _Ranks(Communicator):
    """So many ranks that all have the same, on the meta device; nothing is sent."""

    def __init__(self, world_size: int) -> None:
        super().__init__(None)
        self.world_size = world_size

    @property
    @override
    def device(self) -> torch.device:
        return META

    @override
    def gather(self, tensor: Tensor, destination: int) -> list[Tensor]:
        return [tensor] * self.world_size

    @override
    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor] * self.world_size

    @override
    def all_gather_json(self, value: object) -> list[object]:
        return [value] * self.world_size
