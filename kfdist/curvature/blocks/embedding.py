"""Tables of which rows are looked up by number: embeddings, of single rows and of bags (docs/decisions/0018)."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from typing_extensions import override

from kfdist.curvature.blocks.base import Operation, ParameterPart
from kfdist.curvature.blocks.linear import LinearBlock
from kfdist.curvature.blocks.rows import RowSums, accumulation_dtype, draw_positions
from kfdist.curvature.statistics import FactorSums
from kfdist.linalg.sparse_rows import dense_of, overwrite
from kfdist.linalg.uploads import sent
from kfdist.types import BlockName, BlockShape

LOOKUP = Operation("lookup")
"""y_t is the table's row of the t-th number."""

BAGS = {"sum": Operation("bag, sum"), "mean": Operation("bag, mean")}
"""y is the sum or the mean of the rows of a bag's numbers."""

TABLE_SUMS = frozenset({"A_diagonal", "G", "g"})
"""What can be asked of a table's call."""

NOWHERE = -1
"""Number that stands for no row: padding, whose gradient torch drops."""


class EmbeddingBlock(LinearBlock):
    """Block of a table `[V, p]`: a Linear without bias whose input says how often each row of the table is used.

    Looked up one by one, the input is one-hot: position t adds e_v g_t^T for the number v. Then A is diagonal, the
    frequencies of the numbers, and as a vector `[1, V]` no larger than the table. Inputs of bags have several entries
    (1 over the bag's size for each number of a mean); of their A the diagonal is kept. Positions are rows whatever
    the model's weight sharing: their numbers have no mean.

    What it takes for activations are numbers `[N, T, 1]`, or `[N, 1, L]` for bags of at most L, where `NOWHERE` fills
    up and stands for padding. Its matrix is the table's transpose, p x V.

    Args:
        name: As for `Block`.
        module: As for `Block`.
        weight: The table, transposed.
        bag: How bags are reduced, "sum" or "mean"; None: there are none.
        layer: As for `Block`.
    """

    def __init__(
        self,
        name: BlockName,
        module: nn.Module,
        weight: ParameterPart,
        bag: str | None = None,
        *,
        layer: str | None = None,
    ) -> None:
        super().__init__(name, module, weight, None, layer=layer)
        self.operation = LOOKUP if bag is None else BAGS[bag]
        self._bag = bag

    # What the layer saw ----------------------------------------------------------------------------------------------

    @override
    def batched(
        self, activation: Integer[Tensor, "..."], output_gradient: Float[Tensor, "..."]
    ) -> tuple[Integer[Tensor, "N T L"], Float[Tensor, "N T p"]]:
        g = self._with_positions(output_gradient, self.shape.d_out, "output gradient")
        numbers = activation.detach()
        width = 1 if self._bag is None else numbers.shape[-1]
        if numbers.numel() != g.shape[:2].numel() * width:
            raise ValueError(
                f"block {self.name}: numbers {tuple(activation.shape)} and output gradient "
                f"{tuple(output_gradient.shape)} differ in examples or positions; both must be from the same call"
            )
        return numbers.reshape(*g.shape[:2], width), g

    @override
    def pooled(
        self,
        activation: Integer[Tensor, "N T L"],
        output_gradient: Float[Tensor, "N T p"],
        kept: Bool[Tensor, "N T"] | None = None,
    ) -> tuple[Integer[Tensor, "N T L"], Float[Tensor, "N T p"], Bool[Tensor, "N T"] | None]:
        return activation, output_gradient, kept

    @override
    def met(self, activation: Integer[Tensor, "N T L"]) -> Bool[Tensor, "N T"]:
        return (activation != NOWHERE).any(-1)

    # Statistics ------------------------------------------------------------------------------------------------------

    @override
    def factor_sums(
        self,
        activation: Integer[Tensor, "..."],
        output_gradient: Float[Tensor, "..."],
        *,
        positions_fraction: float = 1.0,
        most_positions: int | None = None,
        seed: int = 0,
        biased: bool = True,
        kept: Bool[Tensor, "N T"] | None = None,
        wanted: frozenset[str] = TABLE_SUMS,
    ) -> FactorSums:
        """Adds up G and g as `LayerBlock.factor_sums` does, and the diagonal of A over all positions.

        "A" and "a" aren't offered. An output gradient that doesn't count is left out: padding has one.
        """
        del biased
        numbers, g = self.batched(activation, output_gradient)
        positions, p = g.shape[1], self.shape.d_out
        chosen = draw_positions(positions, positions_fraction, seed, most_positions)
        outputs = RowSums(g, (1, p), second="G" in wanted, first="g" in wanted)
        used, some = kept, g
        if chosen is not None:
            chosen = sent(chosen, g.device)
            some, used = g.index_select(1, chosen), None if kept is None else kept.index_select(1, chosen)
        if kept is not None:
            assert used is not None, "it has the positions of the other"
            some = some.masked_fill(~used.unsqueeze(-1), 0)
        outputs.add(some.unsqueeze(0), 1)
        share = positions / max(1, some.shape[1])
        outputs.scale(share)
        left_out = None if kept is None else ~kept.unsqueeze(-1)
        counted = numbers if left_out is None else numbers.masked_fill(left_out, NOWHERE)
        return FactorSums(
            A=outputs.none(2),
            G=outputs.none(2) if outputs.second is None else outputs.second,
            a=outputs.none(1),
            g=outputs.none(1) if outputs.first is None else outputs.first,
            rows=len(g) * positions if used is None else used.sum() * share,
            A_diagonal=self._diagonal(counted, accumulation_dtype(g)) if "A_diagonal" in wanted else None,
        )

    @property
    @override
    def _computed_shape(self) -> BlockShape:
        """A lookup computes nothing: G is paid for as by a layer of its width."""
        return replace(self.shape, d_in=self.shape.d_out)

    def _diagonal(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the sum over rows a of their squares, `[1, V]`.

        A row has c_v s at v, for c_v entries of v in a bag and s 1 or, of means, 1 over the bag's size. Each of these
        entries brings c_v s^2.
        """
        present = numbers != NOWHERE
        shares = present.to(dtype)
        if self._bag is not None:
            ordered = numbers.sort(-1).values
            present = ordered != NOWHERE
            repeats = torch.searchsorted(ordered, ordered, right=True) - torch.searchsorted(ordered, ordered)
            shares = repeats.to(dtype) * present
            if self._bag == "mean":
                shares = shares / present.sum(-1, keepdim=True).clamp_min(1).square()
            numbers = ordered
        total = torch.zeros(self.shape.d_in, dtype=dtype, device=numbers.device)
        return total.index_add_(0, numbers.clamp_min(0).flatten(), shares.flatten()).unsqueeze(0)

    # Gradients -------------------------------------------------------------------------------------------------------

    @override
    def write_gradient(self, direction: Float[Tensor, "c p q"], scale: Float[Tensor, "..."] | None = None) -> None:
        """Keeps a sparse gradient sparse: with A diagonal, a row without a gradient has no direction."""
        gradient = self.parts[0].parameter.grad
        if gradient is None or not gradient.is_sparse:
            super().write_gradient(direction, scale)
            return
        overwrite(gradient.detach(), (direction if scale is None else direction * scale.view(-1, 1, 1))[0].mT)

    @override
    def _gradients(self) -> list[Tensor]:
        return [dense_of(each) for each in super()._gradients()]
