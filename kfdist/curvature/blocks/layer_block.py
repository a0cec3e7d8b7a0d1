"""A layer's rows, and the sums that its factors are made of."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor
from torch.nn import functional as F

from kfdist.curvature.blocks.base import Block
from kfdist.curvature.blocks.row_budget import affordable_rows, is_cheap
from kfdist.curvature.blocks.rows import (
    RowSums,
    accumulation_dtype,
    draw_positions,
    lay_out,
    tiles,
)
from kfdist.curvature.statistics import FactorSums
from kfdist.curvature.thin_sums import Columns
from kfdist.linalg.uploads import sent
from kfdist.types import BlockShape

SUMS = frozenset({"A", "G", "a", "g"})
"""Names of the sums of a call, as in `FactorSums`."""


class LayerBlock(Block, ABC):
    """The block of a layer: turns what the layer saw into statistics.

    It sees its layer as y_t = W a_t at every position t, with W `[c, p, q]`, a_t the row that the weight meets there
    and a homogeneous coordinate for the bias; so example i's gradient is sum_t g_it a_it^T.
    """

    # What the layer saw ----------------------------------------------------------------------------------------------

    @abstractmethod
    def batched(
        self, activation: Float[Tensor, "..."], output_gradient: Float[Tensor, "..."]
    ) -> tuple[Float[Tensor, "N ..."], Float[Tensor, "N ..."]]:
        """Checks what the layer saw in one call and brings it to one form, examples first.

        Args:
            activation: The layer's input.
            output_gradient: Gradient with respect to its output.

        Returns:
            Both, detached; slices of them along dim 0 are taken by all other methods, and by this one again.

        Raises:
            ValueError: Shapes that don't belong to this layer or to each other.
        """

    def met(self, activation: Float[Tensor, "N ..."]) -> Bool[Tensor, "N T"] | None:
        """Returns which rows of a batched activation the weight meets at all; None for all."""
        del activation

    @abstractmethod
    def positions(
        self, activation: Shaped[Tensor, "N ..."], output_gradient: Float[Tensor, "N ..."] | None = None
    ) -> int:
        """Returns how many rows T each example of a batched activation has in the factors.

        Args:
            activation: From `batched`.
            output_gradient: From `batched`; needed only where the layer's settings leave the output's size open (a
                transposed convolution called with `output_size`).
        """

    def pooled(
        self,
        activation: Float[Tensor, "N ..."],
        output_gradient: Float[Tensor, "N ..."],
        kept: Bool[Tensor, "N T"] | None = None,
    ) -> tuple[Float[Tensor, "N ..."], Float[Tensor, "N ..."], Bool[Tensor, "N _"] | None]:
        """Returns batched tensors, and which rows count, as the factors see them; only `reduce` changes them."""
        return activation, output_gradient, kept

    def padded(
        self, activation: Float[Tensor, "N ..."], output_gradient: Float[Tensor, "N ..."]
    ) -> Float[Tensor, "N ..."]:
        """Returns what `input_windows` are cut from: the activation, with what the layer adds around it.

        Both are from `batched` or `pooled`; the shape of `output_gradient` tells the output's size.
        """
        del output_gradient
        return activation

    def padded_elements(self, output_gradient: Float[Tensor, "N ..."]) -> int:
        """Returns the elements that `padded` adds per example, for the bound on memory; 0 where it copies nothing."""
        del output_gradient
        return 0

    @abstractmethod
    def input_windows(
        self, padded: Float[Tensor, "N ..."], chosen: Int64[Tensor, " T"] | None = None
    ) -> Float[Tensor, "c N ..."]:
        """Shows the rows a, without the homogeneous coordinate.

        Args:
            padded: From `padded`.
            chosen: Positions to take, on the same device; None for all.

        Returns:
            `[c, N, *positions, *features]`, features in the order of a matrix's columns; a view where nothing is
            chosen. The number of feature dimensions is `input_features`.
        """

    @abstractmethod
    def output_windows(
        self, output_gradient: Float[Tensor, "N ..."], chosen: Int64[Tensor, " T"] | None = None
    ) -> Float[Tensor, "c N ... p"]:
        """Shows the rows g, `[c, N, *positions, p]`, in the order of `input_windows`."""

    @abstractmethod
    def drawn_inputs(
        self, activation: Float[Tensor, "N ..."], output_gradient: Float[Tensor, "N ..."], chosen: Int64[Tensor, " r"]
    ) -> tuple[Float[Tensor, "c r w"], Columns | None]:
        """Copies single rows a, without the homogeneous coordinate, and nothing beside them.

        Args:
            activation: From `batched` or `pooled`.
            output_gradient: Likewise; its shape tells the positions.
            chosen: Numbers of rows, on the CPU: example times T plus position.

        Returns:
            The rows; and which of their columns are shown, where the others are zero in all of them, None for all.
        """

    @abstractmethod
    def drawn_outputs(
        self, output_gradient: Float[Tensor, "N ..."], chosen: Int64[Tensor, " r"]
    ) -> Float[Tensor, "c r p"]:
        """Copies single rows g, as `drawn_inputs` does."""

    def affordable_rows(
        self, activation: Shaped[Tensor, "N ..."], output_gradient: Float[Tensor, "N ..."], *, whole: bool = False
    ) -> dict[str, tuple[int, int]]:
        """Returns how many rows factors are made of where their cost decides, and of how many; both from `batched`.

        A factor that can be made of all rows as they are is left out. With `whole` all rows are used whatever they
        cost, and what is left are factors that have columns of zeros.
        """
        c, p, q = self.shape.groups, self.shape.d_out, self.shape.d_in
        there = len(activation) * self.positions(activation, output_gradient)
        reached = self.reached_inputs(activation, output_gradient)
        counts = affordable_rows(self._computed_shape, output_gradient.numel() // (c * p), reached=reached)
        counts = (there, there) if whole else counts
        found = {part: (min(count, there), there) for part, count in zip("AG", counts, strict=True)}
        sparse = reached < q and not is_cheap(there, q, c)
        return {part: each for part, each in found.items() if each[0] < there or (part == "A" and sparse)}

    @property
    def _computed_shape(self) -> BlockShape:
        """Shape of the product whose cost pays for the statistics."""
        return self.shape

    def reached_inputs(self, activation: Shaped[Tensor, "N ..."], output_gradient: Float[Tensor, "N ..."]) -> int:
        """Returns how many columns of rows a can differ from zero, given the inputs' size."""
        del activation, output_gradient
        return self.shape.d_in

    @property
    def input_features(self) -> int:
        """How many trailing dimensions of `input_windows` are features."""
        return 1

    # Statistics ------------------------------------------------------------------------------------------------------

    def factor_sums(
        self,
        activation: Float[Tensor, "..."],
        output_gradient: Float[Tensor, "..."],
        *,
        positions_fraction: float = 1.0,
        most_positions: int | None = None,
        seed: int = 0,
        biased: bool = True,
        kept: Bool[Tensor, "N T"] | None = None,
        wanted: frozenset[str] = SUMS,
    ) -> FactorSums:
        """Sums a a^T, g g^T, a and g over the rows of one call of the layer, without a host sync.

        Products are taken in float32, in float64 for float64 input, also under autocast. Rows are laid out in tiles of
        at most `rows.TILE_BYTES` (one position's row, if that is larger), and only for the sums of products; a tile
        also holds the padded inputs of its examples, of one example at least.

        Args:
            activation: The layer's input, examples first.
            output_gradient: Gradient of the loss with respect to the layer's output, examples first; not scaled here.
            positions_fraction: Share of the positions to use, in (0, 1]; drawn without replacement, the same ones for
                every example, and at least one. The sums are scaled so that their expectation is that of all positions.
            most_positions: Use no more positions than this, at least 1; the smaller of both numbers decides.
            seed: Seed of that draw; the same seed draws the same positions in any process and on any device.
            biased: Whether the bias was added; the homogeneous coordinate is 0 where it wasn't.
            kept: Rows that count, of blocks that are `maskable`; None for all. The others are zero, with their
                homogeneous coordinate.
            wanted: Which of "A", "G", "a" and "g" to compute; the others have no elements.

        Raises:
            ValueError: Shapes that don't belong to this layer or to each other, a fraction outside (0, 1], or an
                unknown name in `wanted`.
        """
        if not wanted <= SUMS:
            raise ValueError(f"wanted is {sorted(wanted)}, must be some of {sorted(SUMS)}")
        a, g, kept = self.pooled(*_masked(*self.batched(activation, output_gradient), kept))
        positions = _count(self.output_windows(g[:0]))
        chosen = draw_positions(positions, positions_fraction, seed, most_positions)
        used = positions if chosen is None else len(chosen)
        if chosen is not None:
            chosen = sent(chosen, a.device)
        c, p, q = self.shape.groups, self.shape.d_out, self.shape.d_in - self.homogeneous
        first = "a" in wanted or ("A" in wanted and self.homogeneous)
        inputs = RowSums(a, (c, q), second="A" in wanted, first=first, border=self.homogeneous)
        outputs = RowSums(g, (c, p), second="G" in wanted, first="g" in wanted)
        itemsize = accumulation_dtype(a).itemsize
        plan = tiles(
            len(a),
            positions,
            chosen,
            row_bytes=c * (q * inputs.lays_out(chosen) + p * outputs.lays_out(chosen)) * itemsize,
            example_bytes=self.padded_elements(g) * a.dtype.itemsize * inputs.wanted,
            device=a.device,
        )
        for examples, pieces in plan:
            padded = self.padded(a[examples], g[examples]) if inputs.wanted else a
            for piece in pieces:
                if inputs.wanted:
                    inputs.add(self.input_windows(padded, piece), self.input_features)
                if outputs.wanted:
                    outputs.add(self.output_windows(g[examples], piece), 1)
        if chosen is not None:
            inputs.scale(positions / used)
            outputs.scale(positions / used)
        rows: int | Tensor = len(a) * positions
        if kept is not None:
            rows = (kept if chosen is None else kept.index_select(1, chosen)).sum() * (positions / used)
        return self._named(inputs, outputs, rows=rows, biased=biased, wanted=wanted)

    def drawn_rows(
        self,
        part: str,
        activation: Shaped[Tensor, "N ..."],
        output_gradient: Float[Tensor, "N ..."],
        chosen: Int64[Tensor, " r"],
        *,
        biased: bool = True,
        kept: Bool[Tensor, "N T"] | None = None,
    ) -> tuple[Float[Tensor, "c r w"], Columns | None]:
        """Lays out single rows of a factor, of which `factor_sums` adds up all.

        Args:
            part: "A" or "G".
            activation: From `batched`.
            output_gradient: From `batched`; not scaled here.
            chosen: Numbers of rows, on the CPU: example times T plus position, as the factors see them.
            biased: As in `factor_sums`.
            kept: As in `factor_sums`.

        Returns:
            The rows, in float64 for float64 input, else in float32; and which columns of the factor they are, as others
            are zero; None for all.
        """
        a, g, kept = self.pooled(activation, output_gradient, kept)
        rows, columns = (self.drawn_outputs(g, chosen), None) if part == "G" else self.drawn_inputs(a, g, chosen)
        rows = rows.to(accumulation_dtype(rows))
        if part == "A" and self.homogeneous:
            rows = F.pad(rows, (0, 1), value=float(biased))
            if isinstance(columns, Tensor):
                columns = F.pad(columns, (0, 1), value=self.shape.d_in - 1)
        if kept is not None:  # also of output gradients: that of padding needn't be zero
            rows = torch.where(kept.flatten()[sent(chosen, kept.device)].unsqueeze(-1), rows, 0.0)
        return rows, columns

    def example_rows(
        self,
        activation: Float[Tensor, "..."],
        output_gradient: Float[Tensor, "..."],
        chosen: Int64[Tensor, " n"] | None = None,
        *,
        biased: bool = True,
        kept: Bool[Tensor, "N T"] | None = None,
    ) -> tuple[Float[Tensor, "c m T q"], Float[Tensor, "c m T p"]]:
        """Lays out single examples' rows: example i's gradient of the block is sum_t g_it a_it^T, whatever the sharing.

        Not tiled: rows of all positions of the chosen examples are held, T q numbers an example.

        Args:
            activation: The layer's input, examples first.
            output_gradient: Gradient of the loss with respect to its output; not scaled here.
            chosen: Examples to take, on the same device; None for all.
            biased: As in `factor_sums`.
            kept: As in `factor_sums`, of all examples.

        Returns:
            a, homogeneous coordinate last, and g, in float64 for float64 input, else in float32.

        Raises:
            ValueError: Shapes that don't belong to this layer or to each other.
        """
        return self._laid_out(*_masked(*self.batched(activation, output_gradient), kept), chosen, biased)

    def factor_rows(
        self,
        activation: Float[Tensor, "..."],
        output_gradient: Float[Tensor, "..."],
        chosen: Int64[Tensor, " n"] | None = None,
        *,
        biased: bool = True,
        kept: Bool[Tensor, "N T"] | None = None,
    ) -> tuple[Float[Tensor, "c m T q"], Float[Tensor, "c m T p"]]:
        """Lays out single examples' rows as the factors see them: A and G of `factor_sums` are sums over these rows.

        The same as `example_rows` but for sharing by `reduce`, where T is 1; see there for arguments and results.
        """
        found = self.pooled(*_masked(*self.batched(activation, output_gradient), kept))
        return self._laid_out(*found, chosen, biased)

    def _laid_out(
        self, a: Tensor, g: Tensor, kept: Tensor | None, chosen: Tensor | None, biased: bool
    ) -> tuple[Tensor, Tensor]:
        if chosen is not None:
            a, g = a.index_select(0, chosen), g.index_select(0, chosen)
            kept = None if kept is None else kept.index_select(0, chosen)
        c, p, q = self.shape.groups, self.shape.d_out, self.shape.d_in
        shape = (c, len(a), _count(self.output_windows(g[:0])))
        windows = self.input_windows(self.padded(a, g))
        rows = lay_out(windows, self.input_features, accumulation_dtype(a)).reshape(*shape, q - self.homogeneous)
        if self.homogeneous:
            rows = F.pad(rows, (0, 1), value=float(biased))
            if kept is not None:
                rows[..., -1] *= kept
        return rows, lay_out(self.output_windows(g), 1, accumulation_dtype(g)).reshape(*shape, p)

    def _named(
        self, inputs: RowSums, outputs: RowSums, *, rows: int | Tensor, biased: bool, wanted: frozenset[str]
    ) -> FactorSums:
        """Gives sums their names, with the homogeneous coordinate and, for those not wanted, without elements."""
        A, a = inputs.second, inputs.first
        if self.homogeneous and a is not None:
            A = inputs.bordered(rows, ones=biased)
        if "a" not in wanted:
            a = None  # summed for the border alone
        elif self.homogeneous and a is not None:
            a = torch.cat([a, a.new_full((len(a), 1), float(biased)) * rows], dim=-1)
        return FactorSums(
            A=inputs.none(2) if A is None else A,
            G=outputs.none(2) if outputs.second is None else outputs.second,
            a=inputs.none(1) if a is None else a,
            g=outputs.none(1) if outputs.first is None else outputs.first,
            rows=rows,
        )


def _masked(a: Tensor, g: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sets inputs `[N, T, q]` to zero that don't count, whatever is in them; their output gradients are zero."""
    return (a if kept is None else a.masked_fill(~kept.unsqueeze(-1), 0)), g, kept


def _count(output_windows: Tensor) -> int:
    """Returns T of output windows `[c, n, *positions, p]`."""
    return output_windows.shape[2:-1].numel()
