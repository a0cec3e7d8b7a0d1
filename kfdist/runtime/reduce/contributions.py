"""Reduces the statistics of the groups that are due and brings them to whoever inverts them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kfdist.comm.communicator import Communicator
from kfdist.comm.host_copy import HostCopy
from kfdist.comm.reduce import reduce_flat
from kfdist.curvature.averages import SYMMETRIC, BatchStatistics, WeightedSums, all_finite, folding, packed_statistic
from kfdist.curvature.statistics import STATISTICS, Increment, MeanVectors, Needs, Samples
from kfdist.linalg.lowrank import sketch_rows
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.types import BlockName
from kfdist.wire.records import PackedRecord

_WEIGHT = "weight"


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What one rank adds to the statistics of one block that is due.

    Attributes:
        block: The block's name.
        statistic: The record that its inverter wants.
        summed: Tensors to be summed over the ranks, by name; a `WeightedSums` has its w under "weight".
        common: Tensors that are equal on all ranks.
    """

    block: BlockName
    statistic: type
    summed: dict[str, Tensor]
    common: dict[str, Tensor] = field(default_factory=dict)


def contribution_of_sums(block: BlockName, statistic: type, sums: WeightedSums) -> Contribution:
    """Brings the folded sums of a block."""
    summed = dict(zip([*sums.sums, _WEIGHT], sums.packed(), strict=False)) if sums.sums else {}
    return Contribution(block=block, statistic=statistic, summed=summed)


def with_increment(
    contribution: Contribution,
    needs: Needs,
    widths: Mapping[str, tuple[int, int]],
    batch: BatchStatistics | None,
    *,
    rho: float,
    step_is_finite: Tensor | None,
    like: Tensor,
    rank: int,
    world_size: int,
    seed: int,
) -> Contribution:
    """Adds one folding's rows to what a block brings.

    Every rank fills its own slice of a buffer of `needs.increment_rows` rows; where it has more rows than fit, it adds
    a Gaussian sketch of them over the whole buffer instead. The sketch is linear with E[sketch^T sketch] = rows^T rows
    and its mean is zero, so the sum of the buffers over the ranks has the second moment of the union of their rows in
    expectation, and exactly where all slices were large enough.

    Args:
        contribution: The block's.
        needs: Its method's.
        widths: Groups c and size d of each factor.
        batch: This rank's batch; None if it had none.
        rho: The decay of this folding.
        step_is_finite: Boolean scalar; where false nothing changes.
        like: A tensor of the sums' dtype and device.
        rank: This rank.
        world_size: How many ranks there are.
        seed: Of the sketch; differs from rank to rank.
    """
    kept, gain = folding(rho, step_is_finite, like=like.new_zeros(()))
    rows = {} if batch is None else batch.rows
    finite = torch.zeros((), dtype=torch.bool, device=like.device)
    if batch is not None and rows:
        finite = all_finite([*batch.sums.values(), *rows.values()])
    usable = torch.where(finite, gain, torch.zeros_like(gain))
    summed = dict(contribution.summed)
    for name, (c, d) in widths.items():
        size = needs.increment_rows if name in needs.increments else 0
        buffer = like.new_zeros(c, size, d)
        if size and batch is not None and name in rows:
            own = torch.where(finite, rows[name], torch.zeros_like(gain)).to(like.dtype)
            share = size // world_size
            if name in batch.sketched:
                buffer += own
            elif own.shape[1] > share:
                buffer += sketch_rows(own, size, seed=seed)
            else:
                buffer[:, rank * share : rank * share + own.shape[1]] = own
            buffer *= usable.sqrt()
        summed[f"{name}_rows"] = buffer
    summed["examples"] = (usable * (0.0 if batch is None else batch.examples)).reshape(1)
    return Contribution(block=contribution.block, statistic=Increment, summed=summed, common={"decay": kept.reshape(1)})


class ReducedStatistics:
    """One step's reduced statistics of some groups, on their way from the device to the host.

    On CUDA the copy goes to pinned memory behind the stream's work, so shipping it never makes the step wait.
    """

    def __init__(
        self,
        version: int,
        groups: Sequence[BlockGroup],
        tensors: Mapping[BlockName, Mapping[str, Tensor]],
    ) -> None:
        self.version = version
        self.groups = groups
        self._names = {block: list(of_block) for block, of_block in tensors.items()}
        self._copy = HostCopy([tensor for of_block in tensors.values() for tensor in of_block.values()])

    def ready(self) -> bool:
        """Says, without blocking, whether the copy has landed."""
        return self._copy.ready()

    def records(self) -> dict[str, dict[BlockName, PackedRecord]]:
        """Returns the statistics per group and block; a group without any (no weight at all) has no blocks."""
        arrived = iter(self._copy.wait())
        tensors = {block: {name: next(arrived) for name in names} for block, names in self._names.items()}
        records: dict[str, dict[BlockName, PackedRecord]] = {}
        for group in self.groups:
            found = {
                block.name: _packed(group.inverter.statistic, tensors[block.name])
                for block in group.blocks
                if block.name in tensors
            }
            of_group = {name: record for name, record in found.items() if record is not None}
            records[group.name] = of_group if len(of_group) == len(group.blocks) else {}
        return records


def reduce_contributions(
    contributions: Sequence[Contribution], communicator: Communicator
) -> tuple[dict[BlockName, dict[str, Tensor]], int]:
    """Sums the contributions over all ranks in one flat bucket.

    Every rank must bring the same blocks.

    Returns:
        The reduced tensors by block and name, with the common ones, and the bucket's bytes.
    """
    pieces = [piece for each in contributions for piece in each.summed.values()]
    if not pieces:
        return {each.block: dict(each.common) for each in contributions if each.common}, 0
    reduced = iter(reduce_flat(pieces, communicator))
    tensors = {each.block: {name: next(reduced) for name in each.summed} | each.common for each in contributions}
    return tensors, sum(piece.numel() * piece.element_size() for piece in pieces)


def _packed(statistic: type, tensors: Mapping[str, Tensor]) -> PackedRecord | None:
    """Makes a job's record of what has reached the host; None where nothing was measured."""
    kind = next(name for name, known in STATISTICS.items() if known is statistic)
    if statistic is Samples:
        if not float(tensors[_WEIGHT].sum()) > 0.0:
            return None
        return PackedRecord(kind=kind, tensors=dict(tensors), static={})
    if statistic is Increment:
        if _WEIGHT in tensors and not float(tensors[_WEIGHT]) > 0.0:
            return None  # no batch since the start was usable, so no increment held anything either
        return PackedRecord(kind=kind, tensors=_increment(tensors), static={})
    if not float(tensors[_WEIGHT]) > 0.0:
        return None
    sums = {name: tensor for name, tensor in tensors.items() if name != _WEIGHT}
    return packed_statistic(kind, sums, tensors[_WEIGHT])


def _increment(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns an `Increment`'s tensors: dense factors only where they are due and something was measured."""
    weight = tensors.get(_WEIGHT, torch.zeros(1))
    measured = float(weight) > 0.0
    groups = tensors["A_rows"].shape[0]
    fields = {name: tensors[name] for name in ("A_rows", "G_rows")}
    fields |= {name: tensors[name].reshape(()) for name in ("examples", "decay")}
    for name in sorted(SYMMETRIC):
        present = measured and name in tensors
        fields[name] = tensors[name] / weight if present else tensors["A_rows"].new_zeros(groups, 0)
    return fields


def on_device(statistic: type, tensors: Mapping[str, Tensor]) -> tuple[MeanVectors, Tensor]:
    """Makes the statistic of a method that every rank inverts for itself, without a host sync.

    Returns:
        The statistic, zero where nothing was measured, and a boolean scalar that says whether anything was.
    """
    weight = tensors[_WEIGHT].reshape(())
    measured = weight > 0
    safe = torch.where(measured, weight, torch.ones_like(weight))
    return statistic(**{name: tensor / safe for name, tensor in tensors.items() if name != _WEIGHT}), measured
