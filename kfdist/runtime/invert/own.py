"""What every rank inverts for itself, at once and of the same statistics, instead of waiting for a result."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kfdist.curvature.averages import means, measured
from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.curvature.inverter import Inversion
from kfdist.curvature.statistics import Samples
from kfdist.errors import KfdistError
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.runtime.reduce.reducer import Reduction
from kfdist.seeds import block_seed
from kfdist.types import BlockName


@dataclass(frozen=True, kw_only=True)
class OwnInversion:
    """A group that every rank inverted for itself.

    Attributes:
        preconditioners: By block.
        measured: By block, a boolean scalar: whether any rank had statistics.
    """

    preconditioners: Mapping[BlockName, AbstractPreconditioner]
    measured: Mapping[BlockName, Tensor]


def invert_own(reduction: Reduction, *, seed: int) -> dict[int, OwnInversion]:
    """Inverts, on this rank, the groups among the reduced ones that every rank inverts for itself.

    Args:
        reduction: The statistics, equal on all ranks.
        seed: The run's.

    Returns:
        By group index; a group of which no rank ever had rows is left out.
    """
    made = {}
    for group in (track.group for track in reduction.tracks):
        if group.own:
            inversion = _invert(group, reduction, seed)
            if inversion is not None:
                made[group.index] = inversion
    return made


def _invert(group: BlockGroup, reduction: Reduction, seed: int) -> OwnInversion | None:
    statistics, had_rows = {}, {}
    for name in group.needs:
        if group.inverter.statistic is not Samples:
            sums = reduction.sums[name]
            statistics[name], had_rows[name] = group.inverter.statistic(**means(sums)), measured(sums)
        elif name in reduction.samples:
            statistics[name] = reduction.samples[name]
            had_rows[name] = statistics[name].weight.sum() > 0
        else:
            return None
    seeds = {name: block_seed(seed, name, reduction.step) for name in statistics}
    # What ranks invert damps when it is applied (`AbstractInverter` refuses any other): this number has no effect.
    inversions = group.inverter.invert_group(statistics, damping=1.0, previous={}, seeds=seeds)
    return OwnInversion(
        preconditioners={name: _preconditioner(name, each) for name, each in inversions.items()}, measured=had_rows
    )


def _preconditioner(name: BlockName, inversion: Inversion) -> AbstractPreconditioner:
    if inversion.preconditioner is None:
        raise KfdistError(f"block {name!r}: {inversion.reason}")
    return inversion.preconditioner
