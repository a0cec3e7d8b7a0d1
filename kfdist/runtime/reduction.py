"""Reduces the statistics of the groups that are due and brings them to their courier rank's host memory."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfdist.comm.groups import Communicator
from kfdist.comm.reduce import reduce_flat
from kfdist.curvature.estimate import WeightedSums, packed_factors
from kfdist.curvature.records import PackedRecord
from kfdist.runtime.groups import BlockGroup
from kfdist.types import BlockName


class ReducedStatistics:
    """One step's reduced sums of some groups, on their way from the device to the host.

    On CUDA the copy goes to pinned memory behind the stream's work, so shipping it never makes the step wait.
    """

    def __init__(self, version: int, groups: Sequence[BlockGroup], sums: Sequence[Tensor]) -> None:
        self.version = version
        self.groups = groups
        self._event: torch.cuda.Event | None = None
        if sums and sums[0].device.type == "cuda":
            self._sums = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in sums]
            for host, device in zip(self._sums, sums, strict=True):
                host.copy_(device, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._sums = list(sums)

    def ready(self) -> bool:
        """Says, without blocking, whether the copy has landed."""
        return self._event is None or self._event.query()

    def factors(self) -> dict[str, dict[BlockName, PackedRecord]]:
        """Returns Omega and Gamma per group and block; a group without any statistics (sum w = 0) has no blocks."""
        if self._event is not None:
            self._event.synchronize()
        pieces = iter(self._sums)
        factors: dict[str, dict[BlockName, PackedRecord]] = {}
        for group in self.groups:
            of_group: dict[BlockName, PackedRecord] = {}
            for block in group.blocks:
                A, G, weight = next(pieces), next(pieces), next(pieces)
                if float(weight) > 0.0:
                    of_group[block.name] = packed_factors(A, G, weight)
            factors[group.name] = of_group if len(of_group) == len(group.blocks) else {}
        return factors


def reduce_statistics(
    version: int, due: Sequence[BlockGroup], sums: Mapping[BlockName, WeightedSums], communicator: Communicator
) -> tuple[ReducedStatistics | None, int]:
    """Sums the due groups' (S, w) over all ranks in one flat bucket of packed triangles.

    Every rank must call this with the same due groups. Only what this rank ships is kept.

    Returns:
        This rank's share, None if it ships nothing, and the bucket's bytes.
    """
    if not due:
        return None, 0
    packed = [piece for group in due for block in group.blocks for piece in sums[block.name].packed()]
    reduced = reduce_flat(packed, communicator)
    mine: list[Tensor] = []
    shipped: list[BlockGroup] = []
    pieces = iter(reduced)
    for group in due:
        own = [next(pieces) for _ in range(3 * len(group.blocks))]
        if group.courier_rank == communicator.rank:
            shipped.append(group)
            mine.extend(own)
    bucket_bytes = sum(piece.numel() * piece.element_size() for piece in packed)
    return (ReducedStatistics(version, shipped, mine) if shipped else None), bucket_bytes
