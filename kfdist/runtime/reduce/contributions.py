"""What a rank adds to the statistics of the blocks that are due, and their sum over the ranks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from kfdist.comm.communicator import Communicator
from kfdist.curvature.averages import BatchStatistics, WeightedSums, all_finite, folding
from kfdist.curvature.late_sums import LateSums
from kfdist.curvature.statistics import Increment, Needs
from kfdist.linalg.lowrank import sketch_rows
from kfdist.types import BlockName

_BUCKET_BYTES = 1 << 26
"""Bytes that are summed over the ranks at a time: at the first step, at which all blocks are due, not all of them lie
beside the sums that they are of. A larger block is a bucket of its own."""


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What one rank adds to the statistics of one block that is due.

    Attributes:
        block: The block's name.
        statistic: The record that its inverter wants.
        summed: Tensors to be summed over the ranks, by name and of one dtype; a `WeightedSums` has its counts beside.
        like: A tensor of their dtype and device.
        common: Tensors that are equal on all ranks.
    """

    block: BlockName
    statistic: type
    summed: Mapping[str, Tensor]
    like: Tensor
    common: dict[str, Tensor] = field(default_factory=dict)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of what is summed, by name."""
        if isinstance(self.summed, LateSums):
            return self.summed.shapes
        return {name: tuple(tensor.shape) for name, tensor in self.summed.items()}


def contribution_of_sums(block: BlockName, statistic: type, sums: WeightedSums) -> Contribution:
    """Brings the folded sums of a block."""
    return Contribution(block=block, statistic=statistic, summed=sums.late(), like=sums.like)


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
    for name, counted in (("examples", batch and batch.examples), ("positions", batch and batch.positions)):
        summed[name] = (usable * (0.0 if counted is None else counted)).reshape(1)
    common = {"decay": kept.reshape(1)}
    return Contribution(block=contribution.block, statistic=Increment, summed=summed, like=like, common=common)


def reduce_contributions(
    contributions: Sequence[Contribution], communicator: Communicator, *, wanted: Callable[[BlockName], bool]
) -> tuple[dict[BlockName, Mapping[str, Tensor]], int]:
    """Sums the contributions over all ranks, in flat buckets.

    Every rank must bring the same blocks. Where there is one rank alone, nothing is copied: its sums are what
    `WeightedSums.late` handed out.

    Args:
        contributions: This rank's.
        communicator: Carries them.
        wanted: Whether this rank has a use for a block; of the others nothing is kept.

    Returns:
        The reduced tensors by block and name, with the common ones, and the bytes that were brought.
    """
    sent = sum(_bytes(each) for each in contributions)
    found: dict[BlockName, Mapping[str, Tensor]] = {}
    if communicator.world_size == 1:
        for each in contributions:
            if each.summed or each.common:
                found[each.block] = {**each.summed, **each.common} if each.common else each.summed
        return found, sent
    for bucket in _buckets(contributions):
        found |= _reduced(bucket, communicator, wanted)
    return found, sent


def _reduced(
    bucket: Sequence[Contribution], communicator: Communicator, wanted: Callable[[BlockName], bool]
) -> dict[BlockName, Mapping[str, Tensor]]:
    """Sums one bucket over the ranks."""
    sizes = [prod(shape) for each in bucket for shape in each.shapes.values()]
    reduced = iter(())
    if sizes:
        like = next(each.like for each in bucket if each.shapes)
        flat = like.new_empty(sum(sizes))
        places = iter(flat.split(sizes))
        for each in bucket:
            for name in each.shapes:
                if isinstance(each.summed, LateSums):
                    each.summed.put(name, next(places))
                else:
                    next(places).copy_(each.summed[name].reshape(-1))
        travelling = communicator.to_travel(flat)
        communicator.all_reduce_sum_(travelling)
        reduced = iter(travelling.to(like.device).split(sizes))
    whole = all(wanted(each.block) for each in bucket)
    found: dict[BlockName, Mapping[str, Tensor]] = {}
    for each in bucket:
        pieces = {name: next(reduced).view(shape) for name, shape in each.shapes.items()} | each.common
        if pieces and wanted(each.block):  # else a part would hold the memory of all of the bucket
            found[each.block] = pieces if whole else {name: piece.clone() for name, piece in pieces.items()}
    return found


def _buckets(contributions: Sequence[Contribution]) -> Iterator[list[Contribution]]:
    """Takes contributions together, in order, as long as they are small and of one dtype."""
    bucket: list[Contribution] = []
    held = 0
    for each in contributions:
        more = _bytes(each)
        if bucket and (held + more > _BUCKET_BYTES or each.like.dtype != bucket[-1].like.dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(each)
        held += more
    if bucket:
        yield bucket


def _bytes(contribution: Contribution) -> int:
    return contribution.like.itemsize * sum(prod(shape) for shape in contribution.shapes.values())
