"""What inversions take on this machine, by method: jobs of the plan's sizes, done here, as far as there is time.

Larger jobs take longer in proportion to their operations (`AbstractInverter.estimate`), at the speeds that
`kfdist.curvature.auto` measures. What counts is the time of a processor, so that others on the machine don't.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from kfdist.checks import is_whole
from kfdist.curvature.auto import MeasuredCosts, Rate, measure_costs
from kfdist.curvature.inverter import Estimate, Operation
from kfdist.curvature.inverters import AbstractInverter
from kfdist.curvature.jobs import decode_result, encode_job, job_after, run_job
from kfdist.curvature.statistics import Samples
from kfdist.forecast.sample_jobs import statistics_of
from kfdist.linalg.arithmetic import plain_arithmetic
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.types import BlockShape, GroupName
from kfdist.wire.records import tensor_fields

CPU = torch.device("cpu")

_LARGEST, _LARGEST_OF_ROWS = 384, 96
"""Sizes of the first job of a method, which is done in any case; methods that take rows hold rows times sizes."""

_DAMPING = 1e-8
"""So small that methods whose results have the eigenpairs that damping leaves in need keep as many as they may."""

_BUDGET = 2.0
"""Seconds for jobs of the plan's own sizes."""

_REPEATS = 2
_RUNS = _REPEATS + 2
"""How often a job's time goes by for a measurement: its statistics, a first run, and the repeats."""

_GEMM = 512


@dataclass(frozen=True, kw_only=True)
class MethodCost:
    """What a method's inversions take, as multiples of what `AbstractInverter.estimate` says.

    Attributes:
        factor: Measured seconds per estimated second, of the dearest job that was done.
        inverse: Bytes of an inverse in use per number of the estimate.
        state: Bytes of what the next inversion gets back, likewise.
        result: Bytes of a result on its way, likewise.
    """

    factor: float
    inverse: float
    state: float
    result: float


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What this machine's CPU takes, with so many threads.

    Attributes:
        operations: Speeds of operations.
        methods: By the method with its settings, as `repr` has them.
        threads: How many threads did it.
        flops_per_second: Of a product of matrices.
        limits: By group and setting of its method, what there is where the method may ask for more.
        measured: Seconds of the jobs that were done, by the method as `repr` has it and the size of one matrix.
    """

    operations: MeasuredCosts
    methods: Mapping[str, MethodCost]
    threads: int
    flops_per_second: float
    limits: Mapping[GroupName, Mapping[str, int]] = field(default_factory=dict)
    measured: Mapping[tuple[str, BlockShape], float] = field(default_factory=dict)

    def seconds(self, group: BlockGroup) -> float:
        """Returns how long one inversion of a group takes."""
        return sum(block.shape.groups * self._seconds_of_matrix(group, block.shape) for block in group.blocks)

    def is_measured(self, group: BlockGroup) -> bool:
        """Says whether jobs of its sizes were done, rather than smaller ones."""
        return all(self._key(group, block.shape) in self.measured for block in group.blocks)

    def method(self, group: BlockGroup) -> MethodCost:
        """Returns what a group's method takes."""
        return self.methods[repr(group.inverter)]

    def numbers(self, group: BlockGroup) -> int:
        """Returns how many numbers the estimate says that a result has."""
        return sum(block.shape.groups * self._estimate(group, block.shape).numbers for block in group.blocks)

    def _estimate(self, group: BlockGroup, shape: BlockShape) -> Estimate:
        return limited(group, self.limits).estimate(shape)

    def _key(self, group: BlockGroup, shape: BlockShape) -> tuple[str, BlockShape]:
        return repr(limited(group, self.limits)), replace(shape, groups=1)

    def _seconds_of_matrix(self, group: BlockGroup, shape: BlockShape) -> float:
        found = self.measured.get(self._key(group, shape))
        if found is not None:
            return found
        return self.operations.seconds(self._estimate(group, shape).work) * self.method(group).factor


def limited(group: BlockGroup, limits: Mapping[GroupName, Mapping[str, int]]) -> AbstractInverter:
    """Returns a group's method with as many examples and rows of them as there are, if it may take more."""
    inverter, most = group.inverter, limits.get(group.name, {})
    settings = inverter.settings()
    fewer = {name: there for name, there in most.items() if name in settings and _asks_for_more(settings[name], there)}
    return replace(inverter, **fewer) if fewer else inverter


def measure(
    groups: Iterable[BlockGroup], *, threads: int, limits: Mapping[GroupName, Mapping[str, int]] | None = None
) -> Costs:
    """Does jobs of each method that owners, or a rank's own thread, will have to do; takes a few seconds at most.

    Args:
        groups: Of the plan.
        threads: CPU threads of an inversion.
        limits: By group and setting of its method, what there is; as much as the methods take if None.
    """
    sent = [group for group in groups if not group.own]
    former = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with plain_arithmetic(CPU):
            products = _product_rate()
            operations = MeasuredCosts(rates={**measure_costs().rates, Operation.PRODUCTS: products})
            calibration = _Calibration(operations)
            calibration.begin(sent, limits or {})
            calibration.go_on(time.thread_time() + _BUDGET)
    finally:
        torch.set_num_threads(former)
    return Costs(
        operations=operations,
        methods=calibration.methods,
        threads=threads,
        flops_per_second=1.0 / products.per_flop,
        limits=limits or {},
        measured=calibration.measured,
    )


class _Calibration:
    """Jobs that are done one after the other, the cheapest first.

    Args:
        operations: Speeds of operations.

    Attributes:
        methods: As in `Costs`.
        measured: As in `Costs`.
    """

    def __init__(self, operations: MeasuredCosts) -> None:
        self.methods: dict[str, MethodCost] = {}
        self.measured: dict[tuple[str, BlockShape], float] = {}
        self._operations = operations
        self._kinds: dict[tuple[str, BlockShape], tuple[str, AbstractInverter]] = {}

    def begin(self, groups: Iterable[BlockGroup], limits: Mapping[GroupName, Mapping[str, int]]) -> None:
        """Does a small job of each method."""
        dearest: dict[str, tuple[AbstractInverter, BlockShape]] = {}
        for group in groups:
            inverter, name = limited(group, limits), repr(group.inverter)
            for block in group.blocks:
                shape = replace(block.shape, groups=1)
                self._kinds[repr(inverter), shape] = name, inverter
                if name not in dearest or self._estimated(inverter, shape) > self._estimated(*dearest[name]):
                    dearest[name] = inverter, shape
        for name, (inverter, shape) in dearest.items():
            most = _LARGEST_OF_ROWS if inverter.statistic is Samples else _LARGEST
            self._do(name, inverter, _cut(shape, most))

    def go_on(self, deadline: float) -> None:
        """Does jobs of the plan's sizes, as long as the next one will be done by then, in this thread's time."""
        left = [(key, *kind) for key, kind in self._kinds.items() if key not in self.measured]
        for (_, shape), name, inverter in sorted(left, key=lambda each: self._estimated(each[2], each[0][1])):
            expected = _RUNS * self.methods[name].factor * self._estimated(inverter, shape)
            if time.thread_time() + expected < deadline:
                self._do(name, inverter, shape)

    def _estimated(self, inverter: AbstractInverter, shape: BlockShape) -> float:
        return max(self._operations.seconds(inverter.estimate(shape).work), 1e-9)

    def _do(self, name: str, inverter: AbstractInverter, shape: BlockShape) -> None:
        seconds, result = _job(inverter, shape)
        self.measured[repr(inverter), shape] = seconds
        outcome, numbers = decode_result(result).outcomes["block"], max(inverter.estimate(shape).numbers, 1)
        inverse = {} if outcome.preconditioner is None else tensor_fields(outcome.preconditioner)
        self.methods[name] = MethodCost(
            factor=seconds / self._estimated(inverter, shape),
            inverse=sum(each.nbytes for each in inverse.values()) / numbers,
            state=sum(each.nbytes for each in outcome.state.values()) / numbers,
            result=len(result) / numbers,
        )


def _cut(shape: BlockShape, most: int) -> BlockShape:
    """Returns a shape whose dimensions are no longer than `most`."""
    if shape.modes:
        return BlockShape.of_tensors(tuple(min(d, most) for d in shape.modes))
    return replace(shape, d_out=min(shape.d_out, most), d_in=min(shape.d_in, most))


def _job(inverter: AbstractInverter, shape: BlockShape) -> tuple[float, bytes]:
    """Returns the seconds of a job, and its result."""
    job = encode_job(
        inverter=inverter,
        statistics={"block": statistics_of(inverter, shape)},
        damping=_DAMPING,
        seeds={"block": 0},
        previous={},
        threads=torch.get_num_threads(),
    )
    result = run_job(job)
    if decode_result(result).outcomes["block"].state:
        job = job_after(job, result)  # later jobs go on from what the one before has left
    seconds = []
    for _ in range(_REPEATS):
        start = time.thread_time()  # of the thread that also computes its part of what several do
        result = run_job(job)
        seconds.append(time.thread_time() - start)
    return min(seconds), result


def _asks_for_more(setting: object, most: int) -> bool:
    return setting is None or (is_whole(setting) and setting > most)


def _product_rate() -> Rate:
    left = torch.ones(_GEMM, _GEMM, dtype=torch.float32, device=CPU)
    seconds = []
    for _ in range(_REPEATS + 1):
        start = time.thread_time()
        torch.mm(left, left)
        seconds.append(time.thread_time() - start)
    return Rate(fixed=0.0, per_flop=min(seconds) / (2.0 * _GEMM**3))
