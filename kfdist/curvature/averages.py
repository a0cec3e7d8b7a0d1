r"""The moving average of a block's statistics, as weighted sums that add up over ranks.

A rank keeps (S, w) per block and folds each due batch by

    S <- rho S + (1 - rho) sum x,    w <- rho w + (1 - rho) n,

where x are the rows' contributions, and n counts what the statistic is a mean over: examples for Omega, their positions
for Gamma (`COUNTED_BY`). Both are sums over rows, so they add up over positions, calls, micro-batches, ranks and steps,
whatever the lengths, and their quotient is what one process finds on all finite rows at once: ranks may have batches of
different length, or none, and nothing has to be reduced until an inversion is due
(docs/decisions/0016-statistics-are-ratios-of-sums.md).
rho_k = min(1 - 1/k, decay) for the k-th folding (Martens & Grosse 2015, section 5), so the first overwrites and early
estimates are plain averages; w is its own normaliser, so no bias correction is needed elsewhere.
"""

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kfdist.curvature.late_sums import SYMMETRIC, LateSums
from kfdist.curvature.statistics import MODES, Needs
from kfdist.curvature.thin_sums import ThinRows
from kfdist.linalg.psd import pack_triangle, unpack_triangle
from kfdist.types import BlockShape
from kfdist.wire.records import RecordTree, can_travel_as_rows, make_tree

EXAMPLES, POSITIONS, PAIRS = "n_examples", "n_positions", "n_pairs"
"""Names of the counts w among the tensors that travel: N, all examples' positions, and of coarse sums the pairs of
positions that meet."""

COUNTED_BY: Mapping[str, tuple[str, ...]] = {
    "A": (EXAMPLES,),
    "A_diagonal": (EXAMPLES,),
    "G": (POSITIONS,),
    "a": (EXAMPLES, POSITIONS),
    "g": (POSITIONS,),
    "F": (EXAMPLES,),
    "A_next": (EXAMPLES,),
    "G_next": (POSITIONS,),
    "a_cross": (EXAMPLES,),
    "g_cross": (PAIRS,),
}
"""What each sum is divided by; of two counts it is their geometric mean (see `kfdist.curvature.statistics`)."""

_SLICE = {"cpu": 2**18, "": 2**22}
"""Numbers of a sum that are folded at once, by device: what fits into a core's cache, or keeps a device busy."""


def decay_at(update: int, decay: float) -> float:
    """Returns rho_k = min(1 - 1/k, decay) for the `update`-th folding, k = 1, 2, ..."""
    return min(1.0 - 1.0 / update, decay)


@dataclass
class ExampleRows:
    """Rows of some of one rank's examples.

    Attributes:
        a: `[c, n, T', q]`, homogeneous coordinate last.
        g: `[c, n, T', p]`, as in `Samples`.
        weight: How many of the rank's examples each one stands for, `[n]`.
        terms: As in `Samples`, `[n]`.
        positions: T of each example, `[n]`; T' is smaller where columns were compressed, and larger where other
            examples have more.
        frame: The largest T.
    """

    a: Tensor
    g: Tensor
    weight: Tensor
    terms: Tensor
    positions: Tensor
    frame: int


@dataclass
class BatchStatistics:
    """What one step's batch says about a block: the x and n of the module docstring, and rows where they are asked for.

    Attributes:
        sums: Sums over rows by name; "A" of a a^T `[c, q, q]`, "G" of g g^T `[c, p, p]`, and the further ones that
            `sum_shapes` lists; without those of `thin`.
        examples: How many examples are in the sums; `[c]` where matrices have counts of their own, as of experts.
        positions: How many positions they have together, likewise.
        pairs: How many pairs of positions each of "g_cross" is a sum over, `[members]`.
        rows: By factor, all rows of the batch `[c, m, d]`, scaled so that rows^T rows is the factor's sum; or a sketch
            of them, for which that holds in expectation.
        sketched: The factors whose rows are a sketch.
        samples: Rows of single examples.
        thin: By factor, rows whose products are its sum; see `kfdist.curvature.thin_sums`.
    """

    sums: dict[str, Tensor]
    examples: float | Tensor
    positions: float | Tensor
    pairs: Tensor | None = None
    rows: dict[str, Tensor] = field(default_factory=dict)
    sketched: frozenset[str] = frozenset()
    samples: ExampleRows | None = None
    thin: Mapping[str, Sequence[ThinRows]] = field(default_factory=dict)


def sum_shapes(
    shape: BlockShape, needs: Needs, *, following: BlockShape | None = None, members: int = 1
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the sums that a block's method needs, by name in a fixed order.

    Args:
        shape: Of the block.
        needs: Of the method.
        following: The next block of its chain, for cross factors; None for the last.
        members: How many blocks its group has, for coarse sums.

    Raises:
        ValueError: The method needs a sum that doesn't exist.
    """
    c, p, q = shape.groups, shape.d_out, shape.d_in
    p_next, q_next = (0, 0) if following is None else (following.d_out, following.d_in)
    known: dict[str, tuple[int, ...]] = {
        "A": (c, q, q),
        "A_diagonal": (c, q),
        "G": (c, p, p),
        "a": (c, q),
        "g": (c, p),
        "F": (c, p * q, p * q),
        "A_next": (c, q, q_next),
        "G_next": (c, p, p_next),
        "a_cross": (members,),
        "g_cross": (members,),
        **{name: (c, d, d) for name, d in zip(MODES, shape.dimensions, strict=False)},
    }
    unknown = needs.sums - known.keys()
    if unknown:
        raise ValueError(f"no such sums: {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    return {name: size for name, size in known.items() if name in needs.sums}


class WeightedSums:
    """The local (S, w) of one block; plain tensors on the model's device.

    Args:
        shapes: Of the sums, by name; see `sum_shapes`.
        dtype: Of sums and counts.
        device: Where they live.
        routed: Whether each of the c matrices has counts of its own (`kfdist.curvature.blocks.experts`).

    Attributes:
        like: A scalar of the sums' dtype and device.
        sums: Weighted sums by name, as in `BatchStatistics`, to be read.
        counts: w, by the names of `COUNTED_BY`.
        dropped: How many batches were dropped as non-finite, a scalar tensor (read it late: reading syncs a device).
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        routed: bool = False,
    ) -> None:
        self.like: Float[Tensor, ""] = torch.zeros((), dtype=dtype, device=device)
        # One zero each: a first batch's sums take their place, and beside them zeros would be as much memory again.
        self.sums = {name: self.like.new_zeros(()).expand(shape) for name, shape in shapes.items()}
        self._made: set[str] = set()
        of_each = next(iter(shapes.values()))[:1] if routed and shapes else ()
        counts = {EXAMPLES: of_each, POSITIONS: of_each, **({PAIRS: shapes["g_cross"]} if "g_cross" in shapes else {})}
        self.counts = {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in counts.items()}
        self.dropped = torch.zeros((), dtype=torch.float32, device=device)
        self._in_use: dict[str, slice | None] = {}
        self._handed_out: list[weakref.ref[LateSums]] = []
        self._rows: dict[str, Tensor] = {}

    def fold(
        self,
        batch: BatchStatistics | None,
        rho: float,
        step_is_finite: Bool[Tensor, ""] | None = None,
        *,
        takes_over: bool = True,
    ) -> None:
        """Folds one due batch in, without a host sync.

        Args:
            batch: This rank's batch; None if it had none. A non-finite one adds zero, like none, and is counted.
            rho: The decay of this folding, the same on all ranks.
            step_is_finite: Where it is false, the whole step is skipped and nothing changes.
            takes_over: Whether a first batch's sums become the average's own memory, and change with it from now on.
        """
        self._freeze()
        self._rows = {}
        kept, gain = folding(rho, step_is_finite, like=self.like)
        for count in self.counts.values():
            count.mul_(kept)
        if batch is None or not self.sums:
            for name in self._made:
                self.sums[name].mul_(kept)
            return
        finite = all_finite(_telling(batch, self.sums))  # all of it, or nothing
        zero = self.like  # which it is
        usable = torch.where(finite, gain, zero)
        root = usable.sqrt() if batch.thin else zero
        for name, total in self.sums.items():
            if name in batch.thin:
                first = name not in self._made
                part = self._part_in_use(name, batch.thin[name])
                if step_is_finite is not None:
                    part.mul_(kept)
                found = batch.thin[name]
                thin = [ThinRows(torch.where(finite, each.rows, zero).mul_(root), each.columns) for each in found]
                _fold_thin(part, thin, decay=rho if step_is_finite is None else 1.0)
                if first and (few := _few_rows(total, thin)) is not None:
                    self._rows[name] = few
                continue
            self._in_use[name] = None
            if takes_over and rho == 0.0 and _same_form(total, batch.sums[name]):
                self.sums[name] = batch.sums[name]
                self._made.add(name)
                for part, new in _slices(total, batch.sums[name]):
                    if step_is_finite is None:
                        torch.where(finite, new, zero, out=new)
                    else:
                        torch.where(finite & step_is_finite, new, part * kept, out=new)
                continue
            for part, new in _slices(self._memory_of(name), batch.sums[name]):
                part.mul_(kept).addcmul_(torch.where(finite, new, zero), usable)
        found = {EXAMPLES: batch.examples, POSITIONS: batch.positions, PAIRS: batch.pairs}
        for name, count in self.counts.items():
            new = found[name]
            assert new is not None, "coarse sums come with their pairs"
            if isinstance(new, Tensor):
                count.addcmul_(usable, new)
            else:
                count.add_(usable, alpha=new)
        self.dropped.add_(~finite)

    def _part_in_use(self, name: str, thin: Sequence[ThinRows]) -> Tensor:
        """Returns the part of a sum that rows are folded into: outside of the columns that ever came it is zero."""
        slices = [each.columns for each in thin if isinstance(each.columns, slice)]
        only = slices[0] if len(slices) == len(thin) and all(each == slices[0] for each in slices) else None
        if self._in_use.setdefault(name, only) != only or only is None:
            self._in_use[name] = only = None
        total = self._memory_of(name)
        return total if only is None else total[:, only, only]

    def _memory_of(self, name: str) -> Tensor:
        """Returns a sum to be changed in place."""
        if name not in self._made:
            self.sums[name] = torch.zeros_like(self.sums[name], memory_format=torch.contiguous_format)
            self._made.add(name)
        return self.sums[name]

    def packed(self) -> dict[str, Tensor]:
        """Returns what travels in a reduction: the sums, symmetric ones as packed triangles, and w; none if empty."""
        if not self.sums:
            return {}
        packed = {name: pack_triangle(total) if name in SYMMETRIC else total for name, total in self.sums.items()}
        return {**packed, **{name: count.reshape(-1) for name, count in self.counts.items()}}

    def late(self) -> LateSums | dict[str, Tensor]:
        """Returns what `packed` would, as it is now; packed when it is asked for, or before a folding changes it."""
        if not self.sums:
            return {}
        found = LateSums(self.sums, self.counts, self._rows)
        self._handed_out = [each for each in self._handed_out if each() is not None] + [weakref.ref(found)]
        return found

    def _freeze(self) -> None:
        """Has what was handed out and isn't packed yet packed now; what nobody wants any more isn't."""
        handed_out, self._handed_out = self._handed_out, []
        for each in handed_out:
            if (found := each()) is not None:
                found.freeze()

    def state_dict(self) -> dict[str, Tensor]:
        """Returns copies of what `packed` returns, of w, and of the number dropped as "dropped"."""
        state = {**self.packed(), **self.counts, "dropped": self.dropped}
        return {name: tensor if name in SYMMETRIC else tensor.clone() for name, tensor in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what `state_dict` returned."""
        self._freeze()
        self._rows = {}
        for name in self.sums:
            total = self._memory_of(name)
            total.copy_(unpack_triangle(state[name]) if name in SYMMETRIC else state[name])
            self._in_use[name] = None
        for name, count in self.counts.items():
            count.copy_(state[name])
        self.dropped.copy_(state["dropped"])


def _telling(batch: BatchStatistics, names: Iterable[str]) -> Iterator[Tensor]:
    """Yields what is finite where all of a batch is; of products of rows the length, which bounds them."""
    for name in names:
        if name in batch.thin:
            yield from (each.length() for each in batch.thin[name])
        else:
            yield batch.sums[name]
    yield from batch.rows.values()


def _fold_thin(total: Tensor, thin: Sequence[ThinRows], *, decay: float) -> None:
    """Folds rows into a sum, with its decay as part of the product."""
    for each in thin:
        if total.shape[-1] == each.rows.shape[-1] and each.columns is not None:  # of the part of the sum that is in use
            total.mul_(decay).add_(each.rows.mT @ each.rows)
        else:
            each.add_to(total, kept=decay)
        decay = 1.0


def _few_rows(total: Tensor, thin: Sequence[ThinRows]) -> Tensor | None:
    """Returns the rows whose products a sum on the host is, where they can travel in its place; else None."""
    width = total.shape[-1]
    sizes = [each.rows.shape[1] for each in thin]
    if total.device.type != "cpu" or not can_travel_as_rows(sum(sizes), width, len(total)):
        return None
    whole = total.new_zeros(len(total), sum(sizes), width)
    for each, part in zip(thin, whole.split(sizes, dim=1), strict=True):
        part[..., slice(None) if each.columns is None else each.columns] = each.rows
    return whole


def _same_form(total: Tensor, new: Tensor) -> bool:
    """Says whether a batch's sum can take the place of an average: a whole tensor of its own, of the same form."""
    alone = new.is_contiguous() and new.untyped_storage().nbytes() == new.nbytes
    return alone and (new.shape, new.dtype) == (total.shape, total.dtype)


def _slices(total: Tensor, new: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Takes two tensors apart along rows: what is computed of a slice is no temporary of a wide layer's size."""
    most = _SLICE.get(total.device.type, _SLICE[""])
    if total.dim() < 2 or total.numel() <= most:
        yield total, new
        return
    rows = max(1, most * total.shape[1] // max(1, total.numel()))
    yield from zip(total.split(rows, dim=1), new.split(rows, dim=1), strict=True)


def folding(
    rho: float, step_is_finite: Bool[Tensor, ""] | None, *, like: Float[Tensor, ""]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Returns rho and 1 - rho as scalars like `like`; 1 and 0 where the step is skipped."""
    kept, gain = torch.full_like(like, rho), torch.full_like(like, 1.0 - rho)
    if step_is_finite is None:
        return kept, gain
    return torch.where(step_is_finite, kept, 1.0), torch.where(step_is_finite, gain, 0.0)


def all_finite(tensors: Iterable[Float[Tensor, "..."]]) -> Bool[Tensor, ""]:
    """Says whether all entries are finite: a sum is non-finite if any entry is."""
    return reduce(torch.add, (tensor.sum() for tensor in tensors)).abs() < math.inf


def means(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Divides each sum by its count, S / w; without a host sync, and zero where nothing was counted.

    Args:
        tensors: Sums, packed or not, and counts by name, as `WeightedSums.packed` has them.
    """
    return _means(tensors, [name for name in tensors if name in COUNTED_BY])


def _count_of(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Returns what a sum is divided by; one where nothing was counted."""
    counts = [tensors[each] for each in COUNTED_BY[name]]
    count = counts[0] if len(counts) == 1 else (counts[0] * counts[1]).sqrt()
    return torch.where(count > 0, count, torch.ones_like(count))


def _means(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    found = {}
    for name in names:
        count = _count_of(tensors, name)
        late = isinstance(tensors, LateSums)
        total = tensors.own(name) if late else tensors[name]
        count = count.reshape(-1, *(1,) * (total.dim() - 1))
        found[name] = total.div_(count) if late else total / count  # a triangle of its own is divided in place
    return found


def measured(tensors: Mapping[str, Tensor]) -> Bool[Tensor, ""]:
    """Says whether any example, and any position of one, is in sums with their counts."""
    return (tensors[EXAMPLES].sum() > 0) & (tensors[POSITIONS].sum() > 0)


def packed_statistic(kind: str, tensors: Mapping[str, Tensor]) -> RecordTree:
    """Turns reduced sums into a statistic, packed as they are.

    Args:
        kind: Name of the record in `STATISTICS` whose fields the sums are.
        tensors: Sums and counts by name; triangles stay triangles.

    Returns:
        The record's tree, ready for a job's payload: the rank never builds the square matrices. Sums of few products
        are their rows.
    """
    rows = tensors.rows if isinstance(tensors, LateSums) else {}
    few = {name: {"rows": each / _count_of(tensors, name).sqrt().reshape(-1, 1, 1)} for name, each in rows.items()}
    return make_tree(kind, few | _means(tensors, [each for each in tensors if each in COUNTED_BY and each not in few]))
