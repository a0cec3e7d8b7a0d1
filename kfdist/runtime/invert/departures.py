"""Reduced statistics on their way from the device to the host, where they become records for a job."""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from kfdist.comm.host_copy import HostCopy
from kfdist.curvature.averages import EXAMPLES, means, measured, packed_statistic
from kfdist.curvature.late_sums import SYMMETRIC, LateSums
from kfdist.curvature.statistics import STATISTICS, GradientMoments, Increment, Samples
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.types import BlockName, GroupName
from kfdist.wire.records import RecordTree, make_tree

Reduced = Mapping[BlockName, Mapping[str, Tensor]]
"""What was reduced of some blocks, by name."""


class Departure:
    """One step's reduced statistics of some groups, on their way from the device to the host.

    On CUDA the copy goes to pinned memory behind the stream's work, so shipping it never makes the step wait.

    Args:
        version: The step.
        groups: The groups that this rank ships.
        tensors: What was reduced of their blocks; blocks of which there is nothing are missing. They never change, or
            are packed before they do.
        damping: lambda that the jobs say.
        previous: What the inverters left behind the last time, by group.
    """

    def __init__(
        self,
        version: int,
        groups: Sequence[BlockGroup],
        tensors: Reduced,
        *,
        damping: float,
        previous: Mapping[GroupName, Reduced],
    ) -> None:
        self.version = version
        self.damping = damping
        self.previous = previous
        self._groups = groups
        # Of a device's sums one block's are packed at a time, and copied: all triangles at once are half of the sums.
        self._here = {block: of_block for block, of_block in tensors.items() if _is_late_on_host(of_block)}
        self._copies = {
            block: (list(of_block), HostCopy(list(of_block.values())))
            for block, of_block in tensors.items()
            if block not in self._here
        }

    def ready(self) -> bool:
        """Says, without blocking, whether the copy has landed."""
        return all(copy.ready() for _, copy in self._copies.values())

    def arrived(self) -> Iterator[tuple[BlockGroup, Reduced]]:
        """Yields each group with its blocks' tensors on the host; with none where a block has no statistics at all."""
        landed = {block: dict(zip(names, copy.wait(), strict=True)) for block, (names, copy) in self._copies.items()}
        tensors: Reduced = {**self._here, **landed}
        for group in self._groups:
            found = {block.name: tensors[block.name] for block in group.blocks if block.name in tensors}
            yield group, found if len(found) == len(group.blocks) and all(map(_measured, found.values())) else {}


def _is_late_on_host(of_block: Mapping[str, Tensor]) -> bool:
    """Says whether nothing is to be copied, and nothing to be packed yet."""
    return isinstance(of_block, LateSums) and of_block.on_host


def _measured(tensors: Mapping[str, Tensor]) -> bool:
    """Says whether any usable batch is in what was reduced; an increment without dense factors may hold anything."""
    if EXAMPLES in tensors:
        return bool(measured(tensors))
    return "weight" not in tensors or float(tensors["weight"].sum()) > 0.0  # of samples, or of steps


def job_record(statistic: type, tensors: Mapping[str, Tensor]) -> RecordTree:
    """Makes a job's record of what `Departure.arrived` has of a block, dividing sums by their counts.

    A thread of the link may call it: the tensors are on the host, and nothing changes them.
    """
    kind = next(name for name, known in STATISTICS.items() if known is statistic)
    if statistic in (Samples, GradientMoments):
        return make_tree(kind, tensors)
    if statistic is Increment:
        return make_tree(kind, _increment(tensors))
    return packed_statistic(kind, tensors)


def _increment(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns an `Increment`'s tensors: dense factors only where they are due."""
    fields = {name: tensors[name] for name in ("A_rows", "G_rows")}
    fields |= {name: tensors[name].reshape(()) for name in ("examples", "positions", "decay")}
    absent = tensors["A_rows"].new_zeros(tensors["A_rows"].shape[0], 0)
    return {**fields, **dict.fromkeys(sorted(SYMMETRIC), absent), **means(tensors)}
