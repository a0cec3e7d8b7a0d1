"""Adds up what the hooks saw of every armed block, and scales it when the step is over.

Scaling (algorithms.md 0.2): N is undone at each backward (`kfdist.capture.visits.Scaling`), k micro-batches of loss/k
once their final number is known, at the step. Sums are kept per block; rows only where they are asked for, as copies.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from kfdist.capture.cross_sums import COUNT, ChainSums, CoarseSums
from kfdist.capture.layouts import Layout
from kfdist.capture.masks import MaskedRows, ZeroRows, aligned
from kfdist.capture.measured_call import MeasuredCall
from kfdist.capture.pending import PendingStatistics
from kfdist.capture.requests import (
    CHAIN_SUMS,
    COARSE_SUMS,
    DIAGONAL_SUMS,
    PLAIN_SUMS,
    ROWS,
    SEED_MASK,
    Request,
    Sampling,
)
from kfdist.capture.reservoir import Reservoir
from kfdist.capture.visits import Scaling, Unit, Visit, spread
from kfdist.curvature.averages import BatchStatistics
from kfdist.curvature.blocks import Block, EmbeddingBlock, LayerBlock, UnitBlock
from kfdist.curvature.blocks.experts import ExpertsBlock
from kfdist.curvature.blocks.linear import LinearBlock
from kfdist.curvature.blocks.row_budget import affordable_examples, draw_rows
from kfdist.curvature.blocks.rows import accumulation_dtype
from kfdist.linalg.uploads import sent

_EXAMPLES_SEED = 0x5851F42D4C957F2D
"""Keeps the draw of examples independent of the draw of positions, which has the block's own seed."""

_ROWS_SEEDS = {"A": 0x3C6EF372FE94F82B, "G": 0x1F83D9ABFB41BD6B}
"""Likewise, for the draws of rows."""

_RESERVOIR_SEED = 0x14057B7EF767814F

_MADE_FOR_ALL = "an operation on parameters alone (B @ A, for W + B @ A), with one gradient for all examples"

_LOOKED_UP_FOR_ALL = (
    "a lookup whose dim 0 isn't the examples (batch(examples=...) states their number where dim 0 of the model's first "
    "input isn't it)"
)


class Collector:
    """The statistics of one step.

    Args:
        blocks: By name.
        sampling: How much of a batch is measured; rows and samples have all their positions.
        chains: Blocks whose neighbours' cross factors may be asked, in order.
        coarse: Blocks whose sums with each other may be asked, in order.
        layouts: How inputs lie in layers whose modules say so, by block.

    Attributes:
        zero_rows: Output gradients of layers that have no mask, and positions or no stated number of examples.
        masked: What masks left out.
        indivisible: By block, what used it and whose gradient is a sum over examples.
        empty: Blocks that a batch without examples went through.
    """

    def __init__(
        self,
        blocks: Mapping[str, Block],
        sampling: Sampling,
        *,
        chains: Sequence[Sequence[str]],
        coarse: Sequence[Sequence[str]],
        layouts: Mapping[str, Layout] = MappingProxyType({}),
    ) -> None:
        self._blocks = blocks
        self._layouts = layouts
        self._sampling = sampling
        self._chains, self._coarse = ChainSums(chains, blocks), CoarseSums(coarse)
        # Blocks whose rows meet must be sampled alike.
        self._leader = {name: group[0] for group in (*chains, *coarse) for name in group}
        self._requests: Mapping[str, Request] = {}
        self._pending: dict[str, PendingStatistics] = {}
        self._units: dict[Unit, int] = {}
        self.zero_rows = ZeroRows()
        self.masked = MaskedRows()
        self.indivisible: dict[str, str] = {}
        self.empty: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._pending or name in self.empty

    def arm(self, requests: Mapping[str, Request]) -> None:
        """Says what is asked until the next call."""
        self._requests = requests
        self._chains.arm(requests)
        self._coarse.arm(requests)

    def check_input(self, name: str, activation: Tensor) -> None:
        """Refuses, in the forward, what the shape of a block's input tells that it can't be measured.

        Raises:
            KfdistError: Several positions in a chain.
        """
        block = self._blocks[name]
        if activation.dim() > 2 and isinstance(block, LinearBlock) and self._chains.wants(name):
            positions = block.positions(activation[:0].flatten(1, -2))
            self._chains.check(name, groups=block.shape.groups, positions=positions)

    def add(
        self,
        visit: Visit,
        output_gradient: Tensor,
        scaling: Scaling,
        draw: int = 0,
        *,
        tells: Tensor | None,
    ) -> None:
        """Adds one call of a layer with the gradient of its output.

        Args:
            visit: The call; the first time it comes its input is measured, later times the gradient alone.
            output_gradient: As autograd gave it.
            scaling: Of it.
            draw: Tells apart gradients of the same call, which add up as sums of products.
            tells: Output gradient that tells which rows the loss depends on; None where an earlier one told.
        """
        block, request = self._blocks[visit.name], self._requests[visit.name]
        self.masked.note(visit.stated)
        if visit.for_all:
            self.indivisible[block.name] = _MADE_FOR_ALL
            return
        if isinstance(block, UnitBlock):
            self._add_units(block, visit, output_gradient, scaling)
            return
        if isinstance(block, ExpertsBlock):
            self._add_routed(block, visit, output_gradient, scaling)
            return
        assert isinstance(block, LayerBlock), "there are no other blocks"
        if isinstance(block, EmbeddingBlock) and not _has_examples(visit, output_gradient):
            self.indivisible[block.name] = _LOOKED_UP_FOR_ALL
            return
        whole = output_gradient
        activation, output_gradient = self._by_example(visit, block, whole)
        examples = visit.examples(len(activation))
        if not len(activation) or not examples:
            self.empty.add(visit.name)
            return
        pending, first = self._begin(visit, output_gradient)
        fresh = None
        if tells is not None:
            told = (activation, output_gradient) if tells is whole else self._by_example(visit, block, tells)
            fresh = self._fresh(visit, block, *told)
        if request.samples is not None:
            if pending.reservoir is None:
                pending.reservoir = Reservoir(
                    request.samples,
                    request.seed ^ _RESERVOIR_SEED,
                    rows=request.sample_rows,
                    columns=request.sample_columns,
                    pooled=request.samples_pooled,
                )
            pending.reservoir.add(visit, block, activation, output_gradient, scaling, fresh)
        entries = len(activation) // visit.grouped(len(activation))
        # How many rows count is known of all examples, also where some are measured.
        counted = None if fresh is None else block.pooled(activation, output_gradient, fresh)[2]
        chosen, boost = self._sampled(visit, activation)
        if chosen is not None:
            activation, output_gradient = activation[chosen], output_gradient[chosen]
            fresh = None if fresh is None else fresh[chosen]
        share = pending.share(visit, examples)
        seen = MeasuredCall(
            visit=visit,
            block=block,
            request=request,
            activation=activation,
            output_gradient=output_gradient,
            kept=fresh,
            entries=entries,
            boost=boost * share,
            examples=examples,
            scaling=scaling,
            first=first or fresh is not None,
            draw=draw,
        )
        n_rows = self._add_sums(pending, seen)
        if request.rows:
            pending.add_rows(seen)
        self._add_coupled(seen, first=first)
        if counted is not None:
            pending.positions = pending.positions + counted.sum(dtype=pending.like.dtype) * share
        elif first:
            pending.positions = pending.positions + n_rows * boost * share

    def _begin(self, visit: Visit, output_gradient: Tensor) -> tuple[PendingStatistics, bool]:
        """Returns what there is of a block, and whether a call comes for the first time."""
        pending = self._pending.get(visit.name)
        if pending is None:
            like = output_gradient.new_zeros((), dtype=accumulation_dtype(output_gradient))
            pending = self._pending[visit.name] = PendingStatistics(like)
        first = visit.number < 0
        if first:
            # Seeds count the calls of this step alone, so that a resumed run draws what the uninterrupted one does.
            visit.number = pending.calls
            pending.calls += 1
        return pending, first

    def _add_routed(self, block: ExpertsBlock, visit: Visit, output_gradient: Tensor, scaling: Scaling) -> None:
        """Adds one product of experts: see `add`, and `ExpertsBlock` for what is counted."""
        n_rows = visit.activation.numel() // block.shape.d_in
        examples = visit.examples(n_rows)
        if not output_gradient.numel() or not examples or visit.reach is None:
            self.empty.add(visit.name)
            return
        pending, first = self._begin(visit, output_gradient)
        wanted = self._requests[visit.name].sums & (PLAIN_SUMS if first else frozenset({"G", "g"}))
        masked = visit.stated.mask is not None
        sums, rows = block.routed_sums(visit.activation, output_gradient, visit.reach, wanted, masked=masked)
        boost = pending.share(visit, examples)
        for part, total in sums.items():
            scale = {"G": scaling.of_products, "g": scaling.of_rows}.get(part)
            pending.add(part, total * boost if scale is None else total * (scale(examples, total) * boost))
        if first:
            pending.positions = pending.positions + rows.to(pending.like.dtype) * boost
            if masked:
                self.masked.add(visit.name, rows.sum(), n_rows)
                self.masked.routed.add(visit.name)
            met = rows > 0
            pending.reached[visit.counted] = pending.reached.get(visit.counted, met) | met

    def _add_units(self, block: UnitBlock, visit: Visit, gradients: Tensor, scaling: Scaling) -> None:
        """Adds one use of a block of units, given its output's gradient with the entries along dim 0."""
        length, known = len(gradients), visit.unit.forward.examples
        if known and length < known and length != visit.stated.examples:
            self.indivisible[block.name] = "an operation whose result has no dimension of examples"
            return
        examples, n = visit.examples(length), visit.grouped(length)
        if not length or not examples:
            self.empty.add(visit.name)
            return
        pending, first = self._begin(visit, gradients)
        assert visit.of_units is not None, "it is a use of units"
        chosen, boost = self._drawn_examples(visit, gradients)
        found = visit.of_units(gradients, chosen=chosen)
        if chosen is None:
            if visit.unit.forward.is_turned(found.shape[:2]):  # time steps one after another
                found = found.unflatten(0, (-1, n)).transpose(0, 1).flatten(0, 1)
            chosen, boost = self._sampled(visit, found)
            found = found if chosen is None else found[chosen]
        boost *= pending.share(visit, examples)
        total = block.fisher_sum(found.unflatten(0, (-1, length // n)).sum(1))
        total.mul_(scaling.of_products(examples, total) * boost)
        pending.add("F", total)
        if first:
            pending.positions += n

    def _drawn_examples(self, visit: Visit, gradients: Tensor) -> tuple[Tensor | None, float]:
        """Draws the examples of which units' gradients are made, where cost decides; as `_sampled`.

        All are taken of what is small, and of time steps one after another.
        """
        length, request, units = len(gradients), self._requests[visit.name], self._blocks[visit.name].shape.groups
        n = visit.grouped(length)
        count = affordable_examples(n, gradients.numel())
        if not self._sampling.by_cost or request.whole or count == n or visit.unit.forward.is_turned((length, units)):
            return None, 1.0
        seed = (request.seed + visit.number) & SEED_MASK
        chosen = spread(draw_rows(n, count, seed ^ _EXAMPLES_SEED), length, n)
        return sent(chosen, gradients.device), n / count

    def drain(self, repeats: int) -> dict[str, BatchStatistics]:
        """Returns the scaled statistics of the blocks that have any, and starts afresh.

        Args:
            repeats: k, where the loss of every micro-batch was divided by k.
        """
        # Where a mask leaves rows out, or experts share them, the device knows how many: some are taken for granted.
        found = {
            name: each
            for name, each in self._pending.items()
            if isinstance(each.positions, Tensor) or each.positions > 0
        }
        drained = {name: self._drained(name, each, repeats) for name, each in found.items()}
        self.forget()
        return drained

    def forget(self) -> None:
        """Starts afresh."""
        self._pending.clear()
        self._units.clear()
        self.indivisible.clear()
        self.empty.clear()
        self._chains.forget()
        self._coarse.forget()
        self.zero_rows = ZeroRows()
        self.masked = MaskedRows()

    def _by_example(self, visit: Visit, block: LayerBlock, output_gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what a layer saw like `LayerBlock.batched`; of a Linear with an example's positions side by side.

        They come one after another in dim 0 where the model flattens its sequences, and before the examples inside of
        an `nn.MultiheadAttention` and where a model has its examples along dim 1.
        """
        activation = visit.activation
        turned = block.maskable and self._is_turned(block.name, visit, output_gradient.shape)
        if turned and output_gradient.dim() > 2:
            activation, output_gradient = activation.transpose(0, 1), output_gradient.transpose(0, 1)
        found = block.batched(activation, output_gradient)
        if not block.maskable:
            return found
        if turned and output_gradient.dim() == 2:
            n = visit.unit.forward.examples or 0
            whole = n > 0 and len(found[0]) % n == 0
            found = tuple((each.reshape(-1, n, each.shape[-1]) if whole else each).transpose(0, 1) for each in found)
        n = visit.grouped(len(found[0]))
        activation, gradient = (each if n == len(each) else each.reshape(n, -1, each.shape[-1]) for each in found)
        return activation, gradient

    def _is_turned(self, name: str, visit: Visit, shape: Sequence[int]) -> bool:
        """Whether a block's layer sees examples along dim 1."""
        layout = self._layouts.get(name)
        if layout == "positions first" or layout == "examples first":
            return layout == "positions first"
        return visit.unit.forward.is_turned(shape, inside=layout is not None)

    def _fresh(self, visit: Visit, block: LayerBlock, activation: Tensor, output_gradient: Tensor) -> Tensor | None:
        """Returns the rows `[N, T]` that count and are not measured yet; None where no mask is of them."""
        mask, shape = visit.stated.mask, output_gradient.shape[:2]
        if not block.maskable or len(shape) != 2:
            return None
        mask = None if mask is None else aligned(mask, (shape[0], shape[1]))
        kept = block.met(activation)
        if mask is None and visit.stated.mask is not None:
            self.masked.fits_not(block.name, visit.stated, (shape[0], shape[1]))
        if mask is not None:
            counted = sent(mask, output_gradient.device) | (output_gradient != 0).any(-1)
            kept = counted if kept is None else kept & counted
        elif shape[1] > 1 or visit.stated.examples is None:
            self.zero_rows.add(block.name, output_gradient)
        if kept is None:
            return None
        fresh = kept if visit.kept is None else kept & ~visit.kept
        if mask is not None:
            self.masked.add(block.name, fresh.sum(), kept.numel() if visit.kept is None else 0)
        visit.kept = kept if visit.kept is None else kept | visit.kept
        return fresh

    def _drained(self, name: str, pending: PendingStatistics, repeats: int) -> BatchStatistics:
        thin = pending.thin_rows()
        request, sums, pairs = self._requests[name], pending.sums, None
        if request.sums & CHAIN_SUMS:
            sums |= self._chains.sums(name, pending.like)
        if request.sums & COARSE_SUMS:
            found, pairs = self._coarse.sums(name, pending.like)
            sums |= found
        for part, power in (("F", 2), ("G", 2), ("g", 1), ("G_next", 2), ("g_cross", 2)):
            if part in sums:
                sums[part].mul_(repeats**power)
        if "G" in thin and repeats != 1:
            thin["G"] = [each.scaled(repeats) for each in thin["G"]]
        rows = {part: store.rows() for part, store in pending.rows.items()}
        sketched = frozenset(part for part, store in pending.rows.items() if store.sketched)
        if "G" in rows:
            rows["G"].mul_(repeats)
        samples = None if pending.reservoir is None else pending.reservoir.rows(repeats)
        examples, positions = (
            each.to(pending.like, non_blocking=True) if isinstance(each, Tensor) else each
            for each in (pending.examples, pending.positions)
        )
        return BatchStatistics(sums, examples, positions, pairs, rows, sketched, samples, thin)

    def _sampled(self, visit: Visit, activation: Tensor) -> tuple[Tensor | None, float]:
        """Picks the measured share of the examples, None for all; the other value makes sums over them unbiased."""
        number = self._units.setdefault(visit.unit, len(self._units))
        n = visit.grouped(len(activation))
        kept = max(1, round(n * self._sampling.examples))
        if kept >= n:
            return None, 1.0
        seed = (self._requests[self._leader.get(visit.name, visit.name)].seed + number) & SEED_MASK
        generator = torch.Generator(device="cpu").manual_seed(seed ^ _EXAMPLES_SEED)
        chosen = spread(torch.randperm(n, generator=generator, device="cpu")[:kept], len(activation), n)
        return sent(chosen, activation.device), n / kept

    def _add_sums(self, pending: PendingStatistics, seen: MeasuredCall) -> int | Tensor:
        """Adds the plain sums that are asked for; returns the number of rows."""
        wanted = seen.request.sums & (PLAIN_SUMS | DIAGONAL_SUMS if seen.first else frozenset({"G", "g"}))
        drawn = self._drawn(seen, wanted)
        for part in sorted(drawn):
            pending.add_drawn(part, seen, *drawn[part])
        wanted -= drawn.keys()
        if not wanted and seen.kept is None:
            return len(seen.activation) * seen.block.positions(seen.activation, seen.output_gradient)
        found = seen.block.factor_sums(
            seen.activation,
            seen.output_gradient,
            positions_fraction=self._sampling.positions,
            most_positions=self._sampling.positions_budget,
            seed=(seen.request.seed + seen.visit.number) & SEED_MASK,
            biased=seen.visit.biased,
            kept=seen.kept,
            wanted=wanted,
        )
        for part in sorted(wanted):
            total: Tensor = getattr(found, part)
            if part == "G":
                total.mul_(seen.scaling.of_products(seen.examples, total) * seen.boost)
            elif part == "g":
                total.mul_(seen.scaling.of_rows(seen.examples, total) * seen.boost)
            elif seen.boost != 1.0:
                total.mul_(seen.boost)
            pending.add(part, total)
        return found.rows

    def _drawn(self, seen: MeasuredCall, wanted: frozenset[str]) -> dict[str, tuple[Tensor, int]]:
        """Draws the rows that factors are made of, and says of how many; factors made of all rows are left out."""
        request, block = seen.request, seen.block
        if not self._sampling.by_cost or not request.sums_alone or not wanted & ROWS:
            return {}
        seed = (request.seed + seen.visit.number) & SEED_MASK
        counts = block.affordable_rows(seen.activation, seen.output_gradient, whole=request.whole)
        return {
            part: (draw_rows(of, count, seed ^ _ROWS_SEEDS[part]), of)
            for part, (count, of) in counts.items()
            if part in wanted
        }

    def _add_coupled(self, seen: MeasuredCall, *, first: bool) -> None:
        """Adds what products with other blocks need; of a call's input when it comes for the first time alone."""
        name, unit = seen.visit.name, seen.visit.unit.whole
        if self._chains.wants(name):
            a, g = seen.rows()
            if first:
                self._chains.add(name, "A_next", unit, a)
            self._chains.add(name, "G_next", (unit, seen.draw), g)
        if self._coarse.wants(name):
            a, g = seen.sums_of_rows()
            if first:
                self._coarse.add(name, "a_cross", unit, a)
                self._coarse.add(name, COUNT, unit, seen.counts_of_rows(a))
            self._coarse.add(name, "g_cross", (unit, seen.draw), g)


def _has_examples(visit: Visit, rows: Tensor) -> bool:
    """Whether what was looked up has the examples along dim 0, as far as their number is known."""
    known = visit.unit.forward.examples
    if visit.unit.forward.is_turned(rows.shape):
        return True
    if visit.activation.dim() == 1 and (known, known) in visit.unit.forward.turned:
        return False  # one number for each example, or for each time step
    return rows.dim() > 1 and (not known or len(visit.activation) in (known, visit.stated.examples))
