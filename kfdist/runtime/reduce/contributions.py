"""What a rank adds to the statistics of the blocks that are due, and their sum over the ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kfdist.comm.communicator import Communicator
from kfdist.comm.reduce import reduce_flat
from kfdist.curvature.averages import BatchStatistics, WeightedSums, all_finite, folding
from kfdist.curvature.statistics import Increment, Needs
from kfdist.linalg.lowrank import sketch_rows
from kfdist.types import BlockName


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What one rank adds to the statistics of one block that is due.

    Attributes:
        block: The block's name.
        statistic: The record that its inverter wants.
        summed: Tensors to be summed over the ranks, by name; a `WeightedSums` has its counts beside.
        common: Tensors that are equal on all ranks.
    """

    block: BlockName
    statistic: type
    summed: dict[str, Tensor]
    common: dict[str, Tensor] = field(default_factory=dict)


def contribution_of_sums(block: BlockName, statistic: type, sums: WeightedSums) -> Contribution:
    """Brings the folded sums of a block."""
    return Contribution(block=block, statistic=statistic, summed=sums.packed())


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
    return Contribution(block=contribution.block, statistic=Increment, summed=summed, common={"decay": kept.reshape(1)})


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
