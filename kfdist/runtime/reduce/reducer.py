"""The reduce verb: from each rank's sums and rows to jobs, or to inversions that every rank makes itself."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfdist.comm.communicator import Communicator
from kfdist.curvature.averages import BatchStatistics, WeightedSums, all_finite, decay_at, sum_shapes
from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.curvature.inverter import Coupling, Inversion, Placement
from kfdist.curvature.statistics import Samples
from kfdist.errors import KfdistError
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.runtime.plan.timetable import Timetable
from kfdist.runtime.reduce.contributions import (
    Contribution,
    ReducedStatistics,
    contribution_of_sums,
    on_device,
    reduce_contributions,
    with_increment,
)
from kfdist.runtime.reduce.example_rows import SampleExchange, SampleRequest
from kfdist.seeds import block_seed, rank_seed
from kfdist.types import BlockName
from kfdist.wire.records import tensor_fields


@dataclass(frozen=True, kw_only=True)
class OwnInversion:
    """A group that every rank inverted for itself.

    Attributes:
        preconditioners: By block.
        measured: By block, a boolean scalar: whether any rank had statistics.
    """

    preconditioners: Mapping[BlockName, AbstractPreconditioner]
    measured: Mapping[BlockName, Tensor]


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """What came of one step's reduction.

    Attributes:
        shipped: Statistics on their way to the host of the rank that ships them; None if this rank ships nothing.
        own: What every rank inverted for itself, by group.
        bytes: What this rank contributed.
    """

    shipped: ReducedStatistics | None
    own: Mapping[int, OwnInversion]
    bytes: int


class StatisticsReducer:
    """Reduces the statistics of the groups that are due. All ranks make the same calls.

    Args:
        communicator: Carries sums and rows.
        timetable: Says what is due.
        samples: Gathers rows of examples.
        ema_decay: Largest rho of the moving average.
        seed: The run's seed.
        device: Where the statistics live.
    """

    def __init__(
        self,
        communicator: Communicator,
        timetable: Timetable,
        samples: SampleExchange,
        *,
        ema_decay: float,
        seed: int,
        device: torch.device,
    ) -> None:
        self._communicator = communicator
        self._timetable = timetable
        self.samples = samples
        self._ema_decay = ema_decay
        self._seed = seed
        self._device = device

    def reduce(
        self,
        step: int,
        due: Sequence[BlockGroup],
        sums: Mapping[BlockName, WeightedSums],
        batches: Mapping[BlockName, BatchStatistics],
        step_is_finite: Tensor | None,
    ) -> Reduction:
        """Reduces what is due at `step`.

        Args:
            step: The step.
            due: The groups with a job, or an inversion of the ranks' own.
            sums: This rank's folded sums.
            batches: This rank's batch.
            step_is_finite: Boolean scalar; where false rows count for nothing. None: true.
        """
        contributions = [
            self._contribution(step, group, name, sums[name], batches.get(name), step_is_finite)
            for group in due
            for name in group.needs
        ]
        tensors, sent = reduce_contributions(contributions, self._communicator)
        before = self.samples.bytes_sent
        requests = self._sample_requests(step, due, sums, batches, step_is_finite)
        gathered = self.samples.gather(requests) if requests else {}
        own = {
            group.index: self._invert_here(step, group, tensors, gathered)
            for group in due
            if group.inverter.placement is Placement.WORKER
        }
        return Reduction(
            shipped=self._shipped(step, due, tensors, gathered),
            own={index: made for index, made in own.items() if made is not None},
            bytes=sent + self.samples.bytes_sent - before,
        )

    def local_samples(
        self,
        step: int,
        due: Collection[int],
        batches: Mapping[BlockName, BatchStatistics],
        step_is_finite: Tensor | None,
    ) -> dict[BlockName, Samples]:
        """Returns this rank's own samples of the groups whose snapshots are to be calibrated."""
        local = {}
        for group in self._timetable.groups:
            if group.index not in due:
                continue
            for block in group.blocks:
                budget = group.needs[block.name].calibration
                assert budget is not None, "calibrating groups have a budget"
                batch = batches.get(block.name)
                request = SampleRequest(
                    block=block.name,
                    shape=block.shape,
                    budget=budget,
                    rows=None if batch is None else batch.samples,
                    step_is_finite=step_is_finite,
                    destination=None,
                    seed=block_seed(self._seed, block.name, step),
                    dtype=_dtype_of(block.parameters()[0]),
                )
                local[block.name] = self.samples.local(request)
        return local

    def _contribution(
        self,
        step: int,
        group: BlockGroup,
        name: BlockName,
        sums: WeightedSums,
        batch: BatchStatistics | None,
        step_is_finite: Tensor | None,
    ) -> Contribution:
        statistic, needs = group.inverter.statistic, group.needs[name]
        if not group.inverter.online:
            return contribution_of_sums(name, statistic, sums)
        dense = Contribution(block=name, statistic=statistic, summed={})
        if self._timetable.inverts(group, step):
            dense = contribution_of_sums(name, statistic, sums)
        if batch is not None and batch.rows:
            _count_dropped(sums, batch.rows.values())
        shape = next(block.shape for block in group.blocks if block.name == name)
        return with_increment(
            dense,
            needs,
            {"A": (shape.groups, shape.d_in), "G": (shape.groups, shape.d_out)},
            batch,
            rho=decay_at(self._timetable.updates_until(group, step), self._ema_decay),
            step_is_finite=step_is_finite,
            like=sums.weight,
            rank=self._communicator.rank,
            world_size=self._communicator.world_size,
            seed=self._own_seed(name, step),
        )

    def _sample_requests(
        self,
        step: int,
        due: Sequence[BlockGroup],
        sums: Mapping[BlockName, WeightedSums],
        batches: Mapping[BlockName, BatchStatistics],
        step_is_finite: Tensor | None,
    ) -> list[SampleRequest]:
        requests = []
        for group in due:
            everyone = group.inverter.placement is Placement.WORKER
            for block in group.blocks:
                budget, batch = group.needs[block.name].samples, batches.get(block.name)
                if budget is None:
                    continue
                if batch is not None and batch.samples is not None:
                    _count_dropped(sums[block.name], (batch.samples.a, batch.samples.g))
                requests.append(
                    SampleRequest(
                        block=block.name,
                        shape=block.shape,
                        budget=budget,
                        rows=None if batch is None else batch.samples,
                        step_is_finite=step_is_finite,
                        destination=None if everyone else group.courier_rank,
                        seed=self._own_seed(block.name, step),
                        dtype=sums[block.name].weight.dtype,
                    )
                )
        return requests

    def _shipped(
        self,
        step: int,
        due: Sequence[BlockGroup],
        tensors: Mapping[BlockName, Mapping[str, Tensor]],
        gathered: Mapping[BlockName, Samples],
    ) -> ReducedStatistics | None:
        mine = [
            group
            for group in due
            if group.inverter.placement is Placement.OWNER and group.courier_rank == self._communicator.rank
        ]
        if not mine:
            return None
        carried: dict[BlockName, Mapping[str, Tensor]] = {}
        for group in mine:
            for block in group.blocks:
                if block.name in gathered:
                    carried[block.name] = tensor_fields(gathered[block.name])
                elif tensors.get(block.name):
                    carried[block.name] = tensors[block.name]
        return ReducedStatistics(step, mine, carried)

    def _invert_here(
        self,
        step: int,
        group: BlockGroup,
        tensors: Mapping[BlockName, Mapping[str, Tensor]],
        gathered: Mapping[BlockName, Samples],
    ) -> OwnInversion | None:
        """Inverts a group on this rank; None where no rank ever had rows of it."""
        statistics, measured = {}, {}
        for name in group.needs:
            if group.inverter.statistic is not Samples:
                statistics[name], measured[name] = on_device(group.inverter.statistic, tensors[name])
            elif name in gathered:
                statistics[name], measured[name] = gathered[name], gathered[name].weight.sum() > 0
            else:
                return None
        seeds = {name: block_seed(self._seed, name, step) for name in statistics}
        inversions = group.inverter.invert_group(statistics, damping=1.0, previous={}, seeds=seeds)
        return OwnInversion(
            preconditioners={name: _preconditioner(name, each) for name, each in inversions.items()},
            measured=measured,
        )

    def _own_seed(self, name: BlockName, step: int) -> int:
        return rank_seed(block_seed(self._seed, name, step), self._communicator.rank)


def empty_sums(groups: Iterable[BlockGroup], device: torch.device) -> dict[BlockName, WeightedSums]:
    """Makes all blocks' sums: float64 for float64 parameters, else float32."""
    sums = {}
    for group in groups:
        chained = group.inverter.coupling is Coupling.CHAIN
        for position, block in enumerate(group.blocks):
            following = group.blocks[position + 1].shape if chained and position + 1 < len(group.blocks) else None
            shapes = sum_shapes(block.shape, group.needs[block.name], following=following, members=len(group.blocks))
            dtype = torch.float64 if block.parameters()[0].dtype == torch.float64 else torch.float32
            sums[block.name] = WeightedSums.zeros(shapes, dtype=dtype, device=device)
    return sums


def _count_dropped(sums: WeightedSums, rows: Iterable[Tensor]) -> None:
    """Counts a batch whose rows are non-finite, where no folding of sums does."""
    if not sums.sums:
        sums.dropped.add_((~all_finite(rows)).to(sums.dropped.dtype))


def _preconditioner(name: BlockName, inversion: Inversion) -> AbstractPreconditioner:
    if inversion.preconditioner is None:
        raise KfdistError(f"block {name!r}: {inversion.reason}")
    return inversion.preconditioner


def _dtype_of(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32
