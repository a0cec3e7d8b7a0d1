"""Notices padding that no mask tells of, and examples that the loss leaves out, by output gradients exactly zero."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfdist.comm.host_copy import HostCopy
from kfdist.errors import KfdistWarning
from kfdist.types import BlockName

LARGE_SHARE = 0.2
"""From here on Omega is off by as much where zero rows are padding. Padding makes them in all blocks that see it: half
of the blocks must have so many, by each one's newest counts, since a step may measure only a few of them. Where a class
token alone is used, only the last layers have; behind a head that starts at zero all rows are zero: there is nothing to
say."""


_IGNORED = (
    "Those that the loss ignores (padding, masked tokens, nodes without a label) count in the statistics unless they "
    "are known: before each backward call preconditioner.batch(mask=...), [N, T], or, without positions, "
    "batch(examples=...) with the number of terms that the loss averages. If they are none (dead units, margins that "
    "are met, positions beside a class token), there is nothing to do"
)
_FITTED = (
    "There were none at first, so that they are hardly padding. A softmax makes them where logits are some hundred "
    "apart: steps have become too long, and examples are fitted exactly. Raise damping, or lower kl_clip or the "
    "learning rate. Units that have died and margins that are met make them too"
)


class PaddingNotice:
    """Warns once. The counts are read when they have reached the host, perhaps at a later step: no step waits."""

    def __init__(self) -> None:
        self._coming: tuple[Sequence[tuple[BlockName, int]], HostCopy] | None = None
        self._shares: dict[BlockName, float] = {}
        self._advice: str | None = None
        self._said = False

    @property
    def coming(self) -> bool:
        """Whether counts are on their way."""
        return self._coming is not None

    def look(self, counts: Mapping[BlockName, tuple[Tensor, int]], *, level: int) -> None:
        """Takes one step's counts, unless others are still on their way, and warns of those that have come.

        What the loss ignores is there from the first counts on; what training makes of it comes later.

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
        if self._advice is None:
            self._advice = _IGNORED if any(zeros) else _FITTED
        for zero, (name, of) in zip(zeros, rows, strict=True):
            self._shares.pop(name, None)
            if zero < of:
                self._shares[name] = zero / of
        shares = sorted((share, name) for name, share in self._shares.items())
        share, name = shares[(len(shares) - 1) // 2] if shares else (0.0, "")
        if share >= LARGE_SHARE:
            self._said = True
            warnings.warn(
                f"{share:.0%} or more of the examples' or positions' output gradients are exactly zero in half of the "
                f"layers, as in {name!r}. {self._advice}",
                KfdistWarning,
                stacklevel=level,
            )
