"""Stacks of matrices of which each row of an input meets one: the experts of a mixture."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from kfdist.curvature.blocks.base import ParameterPart
from kfdist.curvature.blocks.linear import LinearBlock
from kfdist.curvature.blocks.rows import accumulation_dtype
from kfdist.types import BlockName


@dataclass(frozen=True)
class Reach:
    """Which expert each row of a product met; without any of these, the third dimension from the end says it.

    Attributes:
        expert: All rows met this one.
        ends: Rows lie one expert after another and end here, `[E]`; what lies behind the last end met none.
        index: The expert of each entry along dim 0.
    """

    expert: int | None = None
    ends: Tensor | None = None
    index: Tensor | None = None


class ExpertsBlock(LinearBlock):
    """Block of a stack `[E, p, q]` of experts: one pair of factors each, inverted together as c = E groups.

    An expert's Omega is a mean over the examples of those batches in which a row met it, its Gamma a mean over the
    rows that did, as if it were a layer that is called with them: a batch without any leaves both as they are. Which
    example a row is of isn't known, since mixtures sort their rows by expert. There are no rows of single examples,
    then, every position is a row of its own, and all rows are used whatever is sampled elsewhere.
    """

    routed = True

    def __init__(self, name: BlockName, module: nn.Module, weight: ParameterPart, *, layer: str) -> None:
        super().__init__(name, module, weight, None, layer=layer)

    def routed_sums(
        self,
        activation: Float[Tensor, "..."],
        output_gradient: Float[Tensor, "..."],
        reach: Reach,
        names: frozenset[str],
        *,
        masked: bool = False,
    ) -> tuple[dict[str, Tensor], Int64[Tensor, " E"]]:
        """Sums a a^T, g g^T, a or g over the rows that met each expert; waits for the device where only it knows which.

        Args:
            activation: What the product was given.
            output_gradient: Gradient with respect to its output; not scaled here.
            reach: Which row met which expert.
            names: Of "A", "G", "a" and "g".
            masked: Whether some rows are padding. Which ones isn't known once rows are sorted by expert: those without
                any gradient are left out.

        Returns:
            The sums by name, `[E, d, d]` and `[E, d]`, and how many rows met each expert, on the CPU.
        """
        dtype, experts = accumulation_dtype(activation), self.shape.groups
        widths = {"A": self.shape.d_in, "a": self.shape.d_in, "G": self.shape.d_out, "g": self.shape.d_out}
        sums = {
            name: activation.new_zeros(experts, *(widths[name],) * (2 if name.isupper() else 1), dtype=dtype)
            for name in sorted(names)
        }
        counts = [0] * experts
        for expert, a, g in self._rows(activation.detach(), output_gradient.detach(), reach):
            if masked:
                kept = (g != 0).any(-1)
                a, g = a[kept], g[kept]
            counts[expert] += len(a)
            for name, total in sums.items():
                rows = (a if name in "Aa" else g).to(dtype)
                if name.isupper():
                    total[expert].addmm_(rows.mT, rows)  # in place: autocast leaves such products alone
                else:
                    total[expert] += rows.sum(0)
        return sums, torch.tensor(counts, dtype=torch.int64, device="cpu")

    def _rows(self, a: Tensor, g: Tensor, reach: Reach) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yields experts with the rows that met them."""
        q, p = self.shape.d_in, self.shape.d_out
        if reach.expert is not None:
            yield reach.expert, a.reshape(-1, q), g.reshape(-1, p)
            return
        if reach.ends is None and reach.index is None:
            stacked = (each.movedim(-3, 0).flatten(1, -2) for each in (a, g))
            yield from zip(range(self.shape.groups), *stacked, strict=True)
            return
        if reach.index is not None:
            order = reach.index.argsort(stable=True)
            entries = reach.index.bincount(minlength=self.shape.groups).tolist()
            a, g = a[order], g[order]
        else:
            assert reach.ends is not None
            ends = reach.ends.tolist()
            entries = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        start = 0
        for expert, length in enumerate(entries):
            if length:
                piece = slice(start, start + length)
                yield expert, a[piece].reshape(-1, q), g[piece].reshape(-1, p)
            start += length
