"""One call of a layer with one backward through it, as it enters the statistics."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kfdist.capture.requests import Request
from kfdist.capture.visits import Scaling, Visit
from kfdist.curvature.blocks import LayerBlock
from kfdist.curvature.blocks.rows import TILE_BYTES, accumulation_dtype
from kfdist.curvature.thin_sums import ThinRows


@dataclass(frozen=True)
class MeasuredCall:
    """What is measured of one call with one backward; see `kfdist.capture.collect.Collector.add`.

    Attributes:
        kept: Which of the rows count, `[n, T]`; None for all.
        entries: How many entries of dim 0 an example has, one after another.
        boost: What makes sums over the measured share of the examples unbiased.
        examples: N.
        first: Whether the input is to be measured, and not the gradient alone.
    """

    visit: Visit
    block: LayerBlock
    request: Request
    activation: Tensor
    output_gradient: Tensor
    kept: Tensor | None
    entries: int
    boost: float
    examples: int
    scaling: Scaling
    first: bool
    draw: int

    def rows(self) -> tuple[Tensor, Tensor]:
        """Returns rows a `[c, n, T, q]` and g `[c, n, T, p]` of the examples, scaled like the sums, as copies."""
        a, g = self.activation, self.output_gradient
        return self._scaled(*self.block.factor_rows(a, g, biased=self.visit.biased, kept=self.kept))

    def drawn_rows(self, part: str, chosen: Tensor, of: int) -> Iterator[ThinRows]:
        """Yields rows of a factor, drawn from `of` rows and scaled so that they stand for all, some at a time."""
        width = self.block.shape.d_in if part == "A" else self.block.shape.d_out
        row_bytes = self.block.shape.groups * width * accumulation_dtype(self.output_gradient).itemsize
        a, g, many = self.activation, self.output_gradient, math.sqrt(of / len(chosen))
        for some in chosen.split(max(1, TILE_BYTES // row_bytes)):
            rows = ThinRows(*self.block.drawn_rows(part, a, g, some, biased=self.visit.biased, kept=self.kept))
            yield rows.scaled(self.scale_of(part, rows.rows) * many)

    def tiles_of_rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields rows a and g, `[c, n, T, d]`, of a few entries at a time, not scaled: all at once may be too many."""
        a, g, shape = self.activation, self.output_gradient, self.block.shape
        positions = self.block.positions(a[:1], g[:1])
        row_bytes = shape.groups * (shape.d_in + shape.d_out) * accumulation_dtype(a).itemsize
        tile = max(1, TILE_BYTES // max(1, positions * row_bytes))
        for start in range(0, len(a), tile):
            piece = slice(start, start + tile)
            kept = None if self.kept is None else self.kept[piece]
            yield self.block.factor_rows(a[piece], g[piece], biased=self.visit.biased, kept=kept)

    def sums_of_rows(self) -> tuple[Tensor, Tensor]:
        """Returns the sums of the entries of these rows, `[c, n, T]` both, without holding all rows at once."""
        found = [[rows.sum(-1) for rows in tile] for tile in self.tiles_of_rows()]
        return self._scaled(*(torch.cat(side, dim=1) for side in zip(*found, strict=True)))

    def counts_of_rows(self, like: Tensor) -> Tensor:
        """Returns what each row counts for, the root of it, `[1, n, T]` beside sums `[c, n, T]`."""
        roots = like.new_full((1, *like.shape[1:]), math.sqrt(self.boost))
        if self.kept is None:
            return roots
        *_, kept = self.block.pooled(self.activation, self.output_gradient, self.kept)
        assert kept is not None, "what comes in comes out"
        return roots * kept.view_as(roots)

    def scale_of(self, part: str, rows: Tensor) -> Tensor | float:
        """Returns what scales the rows of a factor like its sum."""
        root = math.sqrt(self.boost)
        return root if part == "A" else self.scaling.of_rows(self.examples, rows) * root

    def _scaled(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        root = math.sqrt(self.boost)
        return self._by_example(a * root), self._by_example(g * (self.scaling.of_rows(self.examples, g) * root))

    def _by_example(self, rows: Tensor) -> Tensor:
        """Puts positions of all entries of an example side by side: `[c, entries n, T, ...]` to `[c, n, T, ...]`."""
        return rows.reshape(len(rows), len(self.activation) // self.entries, -1, *rows.shape[3:])
