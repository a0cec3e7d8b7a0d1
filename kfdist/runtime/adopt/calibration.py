"""What ranks measure of a snapshot while it is in use: EKFAC's scales (George et al., arXiv 1806.03884)."""

from collections.abc import Collection, Mapping, Sequence

import torch

from kfdist.comm.communicator import Communicator
from kfdist.comm.reduce import reduce_flat
from kfdist.curvature.averages import decay_at
from kfdist.curvature.statistics import Samples
from kfdist.runtime.adopt.snapshots import SnapshotStore
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.types import BlockName


def calibrate(
    groups: Sequence[BlockGroup],
    due: Collection[int],
    snapshots: SnapshotStore,
    samples: Mapping[BlockName, Samples],
    communicator: Communicator,
    *,
    ema_decay: float,
) -> int:
    """Sums what the ranks' samples say of the snapshots in use over the ranks and folds it into the blocks' memories.

    The first folding after a snapshot came into use overwrites, the k-th keeps rho_k = min(1 - 1/k, ema_decay). All
    ranks must call it with the same groups.

    Args:
        groups: All groups.
        due: Those to calibrate; others, and those without a snapshot, are left alone.
        snapshots: Holds the preconditioners and the memories.
        samples: This rank's samples of this step by block of the groups that are due.
        communicator: Carries the sums.
        ema_decay: Largest rho.

    Returns:
        Bytes that this rank contributed.
    """
    found = []
    for group in groups:
        if group.index not in due or group.index not in snapshots.calibrations:
            continue
        snapshots.calibrations[group.index] += 1
        rho = decay_at(snapshots.calibrations[group.index], ema_decay)
        for block in group.blocks:
            preconditioner = snapshots[group.index].preconditioners[block.name]
            found.append((block.name, rho, preconditioner.calibration_sums(samples[block.name])))
    if not found:
        return 0
    pieces = [piece for _, _, sums in found for piece in sums.values()]
    reduced = iter(reduce_flat(pieces, communicator))
    for name, rho, sums in found:
        memory = snapshots.memories[name]
        for key in sums:
            new = next(reduced) * (1.0 - rho)
            memory[key] = new if key not in memory else torch.add(new, memory[key], alpha=rho)
    return sum(piece.numel() * piece.element_size() for piece in pieces)
