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
        """Sums a a^T, g g^T, a or g over the rows that met each expert, without a host sync.

        Args:
            activation: What the product was given.
            output_gradient: Gradient with respect to its output; not scaled here.
            reach: Which row met which expert.
            names: Of "A", "G", "a" and "g".
            masked: Whether some rows are padding. Which ones isn't known once rows are sorted by expert: those without
                any gradient are left out.

        Returns:
            The sums by name, `[E, d, d]` and `[E, d]`, and how many rows met each expert.
        """
        dtype, experts = accumulation_dtype(activation), self.shape.groups
        widths = {"A": self.shape.d_in, "a": self.shape.d_in, "G": self.shape.d_out, "g": self.shape.d_out}
        sums = {
            name: activation.new_zeros(experts, *(widths[name],) * (2 if name.isupper() else 1), dtype=dtype)
            for name in sorted(names)
        }
        counts = activation.new_zeros(experts, dtype=torch.int64)
        for expert, a, g, kept in self._pieces(activation.detach(), output_gradient.detach(), reach):
            if masked:
                kept = kept & (g != 0).any(-1)
            _add(counts, expert, kept.sum())
            for name, total in sums.items():
                rows = torch.where(kept.unsqueeze(-1), a if name in "Aa" else g, 0).to(dtype)
                if name.isupper():
                    # In place: autocast leaves such products alone.
                    _add(total, expert, total.new_zeros(total.shape[1:]).addmm_(rows.mT, rows))
                else:
                    _add(total, expert, rows.sum(0))
        return sums, counts

    def _pieces(self, a: Tensor, g: Tensor, reach: Reach) -> Iterator[tuple[int | Tensor, Tensor, Tensor, Tensor]]:
        """Yields experts (an index `[1]` where only the device knows it), rows a and g of theirs, and which count."""
        q, p = self.shape.d_in, self.shape.d_out
        if reach.expert is not None or (reach.ends is None and reach.index is None):
            apart = [each.reshape(1, -1, each.shape[-1]) for each in (a, g)]
            if reach.expert is None:
                apart = [each.movedim(-3, 0).flatten(1, -2) for each in (a, g)]
            for expert, (of_a, of_g) in enumerate(zip(*apart, strict=True), start=reach.expert or 0):
                yield expert, of_a, of_g, torch.ones(len(of_a), dtype=torch.bool, device=a.device)
            return
        for expert, places, filled in _tiles(reach, len(a), self.shape.groups):
            of_a, of_g = a.index_select(0, places).reshape(-1, q), g.index_select(0, places).reshape(-1, p)
            yield expert, of_a, of_g, filled.repeat_interleave(len(of_a) // len(places), output_size=len(of_a))


def _tiles(reach: Reach, entries: int, experts: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Splits entries along dim 0 into tiles of one expert each, by index arithmetic on the device alone.

    The host knows neither how many entries an expert met nor how many tiles those take, but a bound: with tiles of
    ceil(entries / E) there are at most 2 E of them.

    Yields:
        The expert, an index `[1]`; the places of its entries, and which of them are filled.
    """
    if reach.index is not None:
        order = reach.index.argsort(stable=True)
        met = reach.index[order].long()
        every = torch.arange(experts, device=met.device)
        ends = torch.searchsorted(met, every, right=True)
        starts = torch.searchsorted(met, every)
    else:
        assert reach.ends is not None
        ends = reach.ends.long()
        order = torch.arange(entries, device=ends.device)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    size = max(1, -(-entries // experts))
    last = torch.div(ends - starts + size - 1, size, rounding_mode="floor").cumsum(0)
    number = torch.arange(entries // size + experts, device=ends.device)
    owner = torch.searchsorted(last, number, right=True)
    expert = owner.clamp_max(experts - 1)
    before = torch.where(expert > 0, last[expert - 1], 0)
    first = starts[expert] + (number - before) * size
    places = first.unsqueeze(1) + torch.arange(size, device=ends.device)
    filled = (places < ends[expert].unsqueeze(1)) & (owner < experts).unsqueeze(1)
    places = order[places.clamp(0, entries - 1)]
    yield from zip(expert.split(1), places.unbind(), filled.unbind(), strict=True)


def _add(total: Tensor, expert: int | Tensor, increment: Tensor) -> None:
    if isinstance(expert, int):
        total[expert] += increment
    else:
        total.index_add_(0, expert, increment.unsqueeze(0))
