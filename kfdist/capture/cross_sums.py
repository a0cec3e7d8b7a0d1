"""Sums of products between layers: neighbours in a chain, and all pairs of a coarse group.

Both pair the rows of the same examples, so they know them by the forward and backward they belong to.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfdist.capture.requests import CHAIN_SUMS, COARSE_SUMS, Request
from kfdist.curvature.blocks import Block
from kfdist.errors import KfdistError

COUNT = "count"
"""Name of the maps that count positions."""


@dataclass
class _Waiting:
    """Rows that wait for those of their neighbours."""

    rows: Tensor | None
    pairs: int


class ChainSums:
    """Cross factors of neighbours in a chain: sum over examples of r_i r_{i+1}^T (algorithms.md 1.3).

    Rows are held until those of both neighbours have come, at most until the step ends.

    Args:
        chains: Names of blocks, in the order of the chain.
        blocks: By name.
    """

    def __init__(self, chains: Sequence[Sequence[str]], blocks: Mapping[str, Block]) -> None:
        self._following = {i: j for chain in chains for i, j in zip(chain, chain[1:], strict=False)}
        self._preceding = {j: i for i, j in self._following.items()}
        self._blocks = blocks
        self._requests: Mapping[str, Request] = {}
        self._waiting: dict[Hashable, dict[str, _Waiting]] = defaultdict(dict)
        self._sums: dict[tuple[str, str], Tensor] = {}

    def arm(self, requests: Mapping[str, Request]) -> None:
        """Says what is asked until the next call."""
        self._requests = requests

    def wants(self, name: str) -> bool:
        """Whether the rows of a block are needed, by itself or by the block before it."""
        return any(self._asked(each) for each in (name, self._preceding.get(name)))

    def check(self, name: str, *, groups: int, positions: int) -> None:
        """Refuses a call whose rows can't be paired.

        Raises:
            KfdistError: Several groups or positions.
        """
        if groups != 1 or positions != 1:
            what = f"{groups} groups" if groups != 1 else "several positions per example"
            raise KfdistError(
                f"layer {name!r} has {what}, so its cross factors with its neighbours aren't defined; "
                "take it out of the chain, or use another method than kfac-tridiagonal"
            )

    def add(self, name: str, part: str, unit: Hashable, rows: Tensor) -> None:
        """Takes the rows of one call.

        Args:
            name: The block.
            part: "A_next" or "G_next".
            unit: Equal for rows that belong together.
            rows: `[c, n, T, d]`, scaled.

        Raises:
            KfdistError: Several groups or positions, or other examples than the neighbour's.
        """
        waiting = self._waiting[part, unit]
        c, _, positions, _ = rows.shape
        self.check(name, groups=c, positions=positions + (name in waiting))
        before, after = self._preceding.get(name), self._following.get(name)
        pairs = [(before, name)] * self._asked(before) + [(name, after)] * (self._asked(name) and after is not None)
        waiting[name] = _Waiting(rows[0, :, 0], len(pairs))
        for i, j in pairs:
            if i in waiting and j in waiting:
                self._pair(part, (i, waiting[i]), (j, waiting[j]))
        if not pairs:
            waiting[name].rows = None

    def _pair(self, part: str, first: tuple[str, _Waiting], second: tuple[str, _Waiting]) -> None:
        (i, left), (j, right) = first, second
        assert left.rows is not None and right.rows is not None, "a pair meets once"
        if len(left.rows) != len(right.rows):
            raise KfdistError(
                f"layers {i!r} and {j!r} of one chain saw {len(left.rows)} and {len(right.rows)} examples in one "
                "forward; take them out of the chain"
            )
        total = self._sums.get((i, part))
        if total is None:
            total = left.rows.new_zeros(1, left.rows.shape[-1], right.rows.shape[-1])
            self._sums[i, part] = total
        total[0].addmm_(left.rows.mT, right.rows.to(total.device))  # in place: autocast leaves such products alone
        for each in (left, right):
            each.pairs -= 1
            if not each.pairs:
                each.rows = None

    def _asked(self, name: str | None) -> bool:
        return name is not None and name in self._requests and bool(self._requests[name].sums & CHAIN_SUMS)

    def sums(self, name: str, like: Tensor) -> dict[str, Tensor]:
        """Returns the sums that were asked of a block, `like` its other statistics where there is nothing to sum."""
        found = {}
        shape, after = self._blocks[name].shape, self._following.get(name)
        following = None if after is None else self._blocks[after].shape
        for part, d, width in (
            ("A_next", shape.d_in, 0 if following is None else following.d_in),
            ("G_next", shape.d_out, 0 if following is None else following.d_out),
        ):
            if part in self._requests[name].sums:
                total = self._sums.get((name, part))
                found[part] = like.new_zeros(1, d, width) if total is None else total
        return found

    def forget(self) -> None:
        """Starts afresh."""
        self._waiting.clear()
        self._sums.clear()


class CoarseSums:
    """Sums of all entries of the factors between any two blocks of a group (algorithms.md 7.1).

    With alpha the sum of a row's entries, row i, column j is the sum over examples and positions of alpha_i alpha_j;
    the number of these pairs is the same sum with 1 in the place of alpha.
    The larger of two maps of different size is down-sampled to the nearest positions. Groups c of a convolution are
    entries of a vector; vectors of different length are repeated to a common one and divided by the root of the
    repetitions, so that for maps of one size the whole stays a Gram matrix.

    Args:
        groups: Names of blocks, in the group's order.
    """

    def __init__(self, groups: Sequence[Sequence[str]]) -> None:
        self._groups = {name: tuple(group) for group in groups for name in group}
        self._requests: Mapping[str, Request] = {}
        self._maps: dict[tuple[str, str], dict[Hashable, list[Tensor]]] = defaultdict(lambda: defaultdict(list))

    def arm(self, requests: Mapping[str, Request]) -> None:
        """Says what is asked until the next call."""
        self._requests = requests

    def wants(self, name: str) -> bool:
        """Whether the maps of a block are needed."""
        return any(
            other in self._requests and bool(self._requests[other].sums & COARSE_SUMS)
            for other in self._groups.get(name, ())
        )

    def add(self, name: str, part: str, unit: Hashable, sums_of_rows: Tensor) -> None:
        """Takes one call's map.

        Args:
            name: The block.
            part: "a_cross", "g_cross" or `COUNT`.
            unit: Equal for maps that belong together; several calls of a layer have their positions side by side.
            sums_of_rows: alpha, `[c, n, T]`, scaled; of `COUNT` what each position counts for.
        """
        self._maps[name, part][unit].append(sums_of_rows)

    def sums(self, name: str, like: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """Returns the sums that were asked of a block, and how many pairs each of "g_cross" is a sum over.

        Args:
            name: The block.
            like: A tensor of its statistics.

        Raises:
            KfdistError: Blocks that saw different numbers of examples in one forward.
        """
        found = {part: self._row(name, part, like) for part in sorted(self._requests[name].sums & COARSE_SUMS)}
        return found, self._row(name, COUNT, like) if "g_cross" in found else None

    def _row(self, name: str, part: str, like: Tensor) -> Tensor:
        return torch.stack([self._entry(name, other, part, like) for other in self._groups[name]])

    def _entry(self, i: str, j: str, part: str, like: Tensor) -> Tensor:
        total = like.new_zeros(())
        mine, others = self._maps[i, part], self._maps[j, part]
        for unit, maps in mine.items():
            if unit not in others:
                continue
            alpha = torch.cat(maps, dim=2)
            if i == j:
                total += alpha.square().sum()
                continue
            beta = torch.cat(others[unit], dim=2).to(alpha.device)
            if alpha.shape[1] != beta.shape[1]:
                raise KfdistError(
                    f"layers {i!r} and {j!r} of one coarse group saw {alpha.shape[1]} and {beta.shape[1]} examples in "
                    "one forward; give one of them another method"
                )
            alpha, beta = _same_positions(alpha, beta)
            total += (_same_groups(alpha, len(beta)) * _same_groups(beta, len(alpha))).sum()
        return total

    def forget(self) -> None:
        """Starts afresh."""
        self._maps.clear()


def _same_positions(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    few = min(alpha.shape[2], beta.shape[2])
    return _nearest(alpha, few), _nearest(beta, few)


def _nearest(alpha: Tensor, few: int) -> Tensor:
    many = alpha.shape[2]
    return alpha if many == few else alpha[:, :, torch.arange(few, device=alpha.device) * many // few]


def _same_groups(alpha: Tensor, others: int) -> Tensor:
    """Repeats alpha `[c, n, T]` to c `others` groups; products of two such are those over their common multiple."""
    return alpha if others == len(alpha) else alpha.repeat_interleave(others, dim=0) / others**0.5
