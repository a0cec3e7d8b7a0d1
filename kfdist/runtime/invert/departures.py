"""Reduced statistics on their way from the device to the host, where they become records for a job."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfdist.comm.host_copy import HostCopy
from kfdist.curvature.averages import SYMMETRIC, WEIGHT, packed_statistic
from kfdist.curvature.statistics import STATISTICS, Increment, Samples
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.types import BlockName
from kfdist.wire.records import RecordTree, make_tree


class DepartingStatistics:
    """One step's reduced statistics of some groups, on their way from the device to the host.

    On CUDA the copy goes to pinned memory behind the stream's work, so shipping it never makes the step wait.

    Args:
        version: The step.
        groups: The groups that this rank ships.
        tensors: What was reduced of their blocks, by name; blocks of which there is nothing are missing.
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

    def records(self) -> dict[str, dict[BlockName, RecordTree]]:
        """Returns the statistics per group and block; a group without any (no weight at all) has no blocks."""
        arrived = iter(self._copy.wait())
        tensors = {block: {name: next(arrived) for name in names} for block, names in self._names.items()}
        records: dict[str, dict[BlockName, RecordTree]] = {}
        for group in self.groups:
            found = {
                block.name: _packed(group.inverter.statistic, tensors[block.name])
                for block in group.blocks
                if block.name in tensors
            }
            of_group = {name: record for name, record in found.items() if record is not None}
            records[group.name] = of_group if len(of_group) == len(group.blocks) else {}
        return records


def _packed(statistic: type, tensors: Mapping[str, Tensor]) -> RecordTree | None:
    """Makes a job's record of what has reached the host; None where nothing was measured."""
    kind = next(name for name, known in STATISTICS.items() if known is statistic)
    if statistic is Samples:
        if not float(tensors[WEIGHT].sum()) > 0.0:
            return None
        return make_tree(kind, tensors)
    if statistic is Increment:
        if WEIGHT in tensors and not float(tensors[WEIGHT]) > 0.0:
            return None  # no batch since the start was usable, so no increment held anything either
        return make_tree(kind, _increment(tensors))
    if not float(tensors[WEIGHT]) > 0.0:
        return None
    sums = {name: tensor for name, tensor in tensors.items() if name != WEIGHT}
    return packed_statistic(kind, sums, tensors[WEIGHT])


def _increment(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns an `Increment`'s tensors: dense factors only where they are due and something was measured."""
    weight = tensors.get(WEIGHT, torch.zeros(1))
    measured = float(weight) > 0.0
    groups = tensors["A_rows"].shape[0]
    fields = {name: tensors[name] for name in ("A_rows", "G_rows")}
    fields |= {name: tensors[name].reshape(()) for name in ("examples", "decay")}
    for name in sorted(SYMMETRIC):
        present = measured and name in tensors
        fields[name] = tensors[name] / weight if present else tensors["A_rows"].new_zeros(groups, 0)
    return fields
