"""What inversions take on this machine, by method: small jobs that are really done, and the known growth from there.

The operations of an inversion (`AbstractInverter.estimate`) run at speeds that `kfdist.curvature.auto` measures. A job
of each method then shows by which factor it takes longer than its operations, and how large its result is.
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
"""Sizes that a job of a second or two at most is made of; methods that take rows hold rows times sizes."""

_DAMPING = 1e-8
"""So small that methods whose results have the eigenpairs that damping leaves in need keep as many as they may."""

_REPEATS = 2
_GEMM = 512


@dataclass(frozen=True, kw_only=True)
class MethodCost:
    """What a method's inversions take, as multiples of what `AbstractInverter.estimate` says.

    Attributes:
        factor: Measured seconds per estimated second.
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
    """

    operations: MeasuredCosts
    methods: Mapping[str, MethodCost]
    threads: int
    flops_per_second: float
    limits: Mapping[GroupName, Mapping[str, int]] = field(default_factory=dict)

    def seconds(self, group: BlockGroup) -> float:
        """Returns how long one inversion of a group takes."""
        of_blocks = sum(
            block.shape.groups * self.operations.seconds(self._estimate(group, block.shape).work)
            for block in group.blocks
        )
        return of_blocks * self.method(group).factor

    def method(self, group: BlockGroup) -> MethodCost:
        """Returns what a group's method takes."""
        return self.methods[repr(group.inverter)]

    def numbers(self, group: BlockGroup) -> int:
        """Returns how many numbers the estimate says that a result has."""
        return sum(block.shape.groups * self._estimate(group, block.shape).numbers for block in group.blocks)

    def _estimate(self, group: BlockGroup, shape: BlockShape) -> Estimate:
        """Estimates an inversion with as many examples and rows of them as there are, if the method may take more."""
        inverter, limits = group.inverter, self.limits.get(group.name, {})
        settings = inverter.settings()
        fewer = {
            name: most for name, most in limits.items() if name in settings and _asks_for_more(settings[name], most)
        }
        if fewer:
            inverter = replace(inverter, **fewer)
        return inverter.estimate(shape)


def measure(
    groups: Iterable[BlockGroup], *, threads: int, limits: Mapping[GroupName, Mapping[str, int]] | None = None
) -> Costs:
    """Does small jobs of each method that owners, or a rank's own thread, will have to do; takes a second or two.

    Args:
        groups: Of the plan.
        threads: CPU threads of an inversion.
        limits: By group and setting of its method, what there is; as much as the methods take if None.
    """
    former = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with plain_arithmetic(CPU):
            products = _product_rate()
            rates = {**measure_costs().rates, Operation.PRODUCTS: products}
            operations = MeasuredCosts(rates=rates)
            wanted: dict[str, tuple[AbstractInverter, list[BlockShape]]] = {}
            for group in groups:
                if not group.own:
                    _, shapes = wanted.setdefault(repr(group.inverter), (group.inverter, []))
                    shapes.extend(block.shape for block in group.blocks)
            methods = {name: _measured(*each, operations) for name, each in wanted.items()}
    finally:
        torch.set_num_threads(former)
    return Costs(
        operations=operations,
        methods=methods,
        threads=threads,
        flops_per_second=1.0 / products.per_flop,
        limits=limits or {},
    )


def _asks_for_more(setting: object, most: int) -> bool:
    return setting is None or (is_whole(setting) and setting > most)


def _measured(inverter: AbstractInverter, shapes: Iterable[BlockShape], operations: MeasuredCosts) -> MethodCost:
    most = _LARGEST_OF_ROWS if inverter.statistic is Samples else _LARGEST
    dearest = max(shapes, key=inverter.cost)
    shape = BlockShape(d_out=min(dearest.d_out, most), d_in=min(dearest.d_in, most), convolution=dearest.convolution)
    seeds = {"block": 0}
    job = encode_job(
        inverter=inverter,
        statistics={"block": statistics_of(inverter, shape)},
        damping=_DAMPING,
        seeds=seeds,
        previous={},
        threads=torch.get_num_threads(),
    )
    seconds, result = [], run_job(job)
    if decode_result(result).outcomes["block"].state:
        job = job_after(job, result)  # later jobs go on from what the one before has left
    for _ in range(_REPEATS):
        start = time.perf_counter()
        result = run_job(job)
        seconds.append(time.perf_counter() - start)
    outcome = decode_result(result).outcomes["block"]
    estimate = inverter.estimate(shape)
    inverse = 0 if outcome.preconditioner is None else _bytes(tensor_fields(outcome.preconditioner).values())
    return MethodCost(
        factor=min(seconds) / max(operations.seconds(estimate.work), 1e-9),
        inverse=inverse / max(estimate.numbers, 1),
        state=_bytes(outcome.state.values()) / max(estimate.numbers, 1),
        result=len(result) / max(estimate.numbers, 1),
    )


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _product_rate() -> Rate:
    left = torch.ones(_GEMM, _GEMM, dtype=torch.float32, device=CPU)
    seconds = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        torch.mm(left, left)
        seconds.append(time.perf_counter() - start)
    return Rate(fixed=0.0, per_flop=min(seconds) / (2.0 * _GEMM**3))
