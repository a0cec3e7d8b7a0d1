"""Notices padding that no mask tells of, by the share of output gradients that are exactly zero."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfdist.comm.host_copy import HostCopy
from kfdist.errors import KfdistWarning
from kfdist.types import BlockName

LARGE_SHARE = 0.2
"""Of all blocks' rows: from here on Omega is off by as much where they are padding. Where only a class token is used
the last layers' alone are zero, and there is nothing to say."""


class PaddingNotice:
    """Warns once. The counts are read when they have reached the host, perhaps at a later step: no step waits."""

    def __init__(self) -> None:
        self._coming: tuple[Sequence[tuple[BlockName, int]], HostCopy] | None = None
        self._said = False

    def look(self, counts: Mapping[BlockName, tuple[Tensor, int]], *, level: int) -> None:
        """Takes one step's counts, unless others are still on their way, and warns of those that have come.

        Args:
            counts: By block, how many rows are zero, on the device, and of how many.
            level: Whose line the warning shows.
        """
        if self._said:
            return
        if counts and self._coming is None:
            rows = [(name, of) for name, (_, of) in counts.items()]
            self._coming = rows, HostCopy([torch.stack([zeros for zeros, _ in counts.values()])])
        if self._coming is None or not self._coming[1].ready():
            return
        (rows, copy), self._coming = self._coming, None
        zeros = copy.wait()[0].tolist()
        share = sum(zeros) / sum(of for _, of in rows)
        if share >= LARGE_SHARE:
            self._said = True
            most, name = max((zero / of, name) for zero, (name, of) in zip(zeros, rows, strict=True))
            warnings.warn(
                f"{share:.0%} of the positions' output gradients are exactly zero, of block {name!r} {most:.0%}. Those "
                "that the loss ignores (padding, masked tokens) count in the statistics unless they are known: call "
                "preconditioner.batch(mask=...), [N, T], before each backward. If they are none (only a class token is "
                "used, dead units), there is nothing to do",
                KfdistWarning,
                stacklevel=level,
            )
