"""A random subset of a step's examples, drawn while its micro-batches come by: nobody knows beforehand how many."""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from kfdist.capture.micro_batches import MicroBatch
from kfdist.capture.visits import Scaling, Unit, Visit, spread
from kfdist.curvature.averages import ExampleRows
from kfdist.curvature.blocks import LayerBlock
from kfdist.curvature.blocks.rows import TILE_BYTES, accumulation_dtype
from kfdist.errors import KfdistError
from kfdist.linalg.lowrank import compress_columns
from kfdist.linalg.uploads import sent


@dataclass
class _Calls:
    """The kept examples of one unit, and their rows of every call of the layer.

    Attributes:
        examples: How many the unit has.
        batch: The micro-batch that it is a part of.
        averaged: N of its loss.
        keys: Of the kept ones.
        chosen: Which they are.
        a: By call, `[c, n, T', q]`.
        g: By call, `[c, n, T', p]`.
        positions: T by call, of each kept one.
        most: The largest T by call.
    """

    examples: int
    batch: MicroBatch
    averaged: int
    keys: list[float]
    chosen: list[int]
    a: dict[Visit, Tensor] = field(default_factory=dict)
    g: dict[Visit, Tensor] = field(default_factory=dict)
    positions: dict[Visit, Tensor] = field(default_factory=dict)
    most: dict[Visit, int] = field(default_factory=dict)

    def keep(self, largest: float) -> None:
        """Drops the examples with larger keys."""
        which = [index for index, key in enumerate(self.keys) if key <= largest]
        if len(which) == len(self.keys):
            return
        self.keys, self.chosen = [self.keys[index] for index in which], [self.chosen[index] for index in which]
        for rows, dim in ((self.a, 1), (self.g, 1), (self.positions, 0)):
            for visit, each in rows.items():
                kept = sent(torch.tensor(which, dtype=torch.int64, device="cpu"), each.device)
                rows[visit] = each.index_select(dim, kept)


class Reservoir:
    """Keeps the rows of at most `size` examples of one block, uniform without replacement over all that come by.

    Every example draws a key; the smallest ones stay. Keys are drawn on the CPU, so nothing waits for a device, and
    only the rows of examples that stay so far are copied. Without `rows` and `columns` that is all positions of them,
    which for an early layer of an image network is a hundred times its input.

    Args:
        size: Most examples.
        seed: Of the keys.
        rows: The most rows of a call to keep: fewer examples where they have more, but at least one.
        columns: Columns of an example's gradient to keep in the place of more positions, of each call.
        pooled: Whether to keep the rows that the factors see, and not those of the gradient.
    """

    def __init__(
        self, size: int, seed: int, *, rows: int | None = None, columns: int | None = None, pooled: bool = False
    ) -> None:
        self._size = size
        self._rows = rows
        self._columns = columns
        self._pooled = pooled
        self._random = random.Random(seed)
        self._units: dict[Unit, _Calls] = {}

    def add(
        self,
        visit: Visit,
        block: LayerBlock,
        activation: Tensor,
        output_gradient: Tensor,
        scaling: Scaling,
        kept: Tensor | None = None,
    ) -> None:
        """Takes the rows of one call; a call that came before adds to its gradients (another head's loss).

        Args:
            visit: The call.
            block: Of the layer.
            activation: From `LayerBlock.batched`.
            output_gradient: Likewise.
            scaling: Of the output gradients.
            kept: Which of the rows count, `[N, T]`; None for all.

        Raises:
            KfdistError: Calls of one forward with different numbers of examples.
        """
        length = len(activation)
        examples, n = visit.grouped(length), visit.examples(length)
        calls = self._units.get(visit.unit)
        of_factors, of_gradient = (
            block.positions(activation, output_gradient),
            block.output_windows(output_gradient[:0]),
        )
        positions = length // examples * (of_factors if self._pooled else of_gradient.shape[2:-1].numel())
        if self._rows is not None and not self._units:
            self._size = min(self._size, max(1, self._rows // max(1, positions)))
        if calls is None:
            calls = self._draw(visit.unit, examples, n)
        elif calls.examples != examples:
            raise KfdistError(
                f"layer {visit.name!r} was called with {calls.examples} and with {examples} examples in one forward, "
                "so no example has rows of its own; use a method that works on factors for it"
            )
        if not len(calls.chosen):
            return
        of_factors = None if self._columns is not None else kept  # compressed columns are of gradients alone
        a, g = self._laid_out(calls, block, (activation, output_gradient, of_factors), biased=visit.biased)
        g = g * scaling.of_rows(n, g)
        counted = a.new_full((len(calls.chosen),), positions)
        if kept is not None:
            chosen = sent(torch.tensor(calls.chosen, dtype=torch.int64, device="cpu"), a.device)
            counted = kept.reshape(examples, -1).sum(1, dtype=a.dtype)[chosen]
        calls.most[visit] = positions
        if visit not in calls.g:
            calls.a[visit], calls.g[visit], calls.positions[visit] = a, g, counted
        elif self._columns is None or positions <= self._columns:
            calls.g[visit] += g
            if of_factors is not None:  # the rows that another head's loss depends on
                calls.a[visit] += a
                calls.positions[visit] += counted
        else:  # compressed, each with columns of its own
            a, g = torch.cat([calls.a[visit], a], dim=2), torch.cat([calls.g[visit], g], dim=2)
            calls.a[visit], calls.g[visit] = compress_columns(a, g, self._columns)

    def _laid_out(
        self, calls: _Calls, block: LayerBlock, seen: tuple[Tensor, Tensor, Tensor | None], *, biased: bool
    ) -> tuple[Tensor, Tensor]:
        """Returns a `[c, n, T', q]` and g `[c, n, T', p]` of the kept examples, compressed a few examples at a time."""
        activation, output_gradient, counting = seen
        length, kept = len(activation), len(calls.chosen)
        places = spread(torch.tensor(calls.chosen, dtype=torch.int64, device="cpu"), length, calls.examples)
        places = sent(places, activation.device).view(kept, -1)
        tile = kept
        if self._columns is not None:
            shape, positions = block.shape, block.output_windows(output_gradient[:0]).shape[2:-1].numel()
            numbers = places.shape[1] * positions * shape.groups * (shape.d_in + shape.d_out)
            tile = max(1, TILE_BYTES // max(1, numbers * accumulation_dtype(activation).itemsize))
        pieces: list[tuple[Tensor, Tensor]] = []
        for some in places.split(tile):
            lay_out = block.factor_rows if self._pooled else block.example_rows
            found = lay_out(activation, output_gradient, some.flatten(), biased=biased, kept=counting)
            a, g = (rows.reshape(len(rows), len(some), -1, rows.shape[-1]) for rows in found)
            pieces.append((a, g) if self._columns is None else compress_columns(a, g, self._columns))
        a, g = pieces[0] if len(pieces) == 1 else (torch.cat(side, dim=1) for side in zip(*pieces, strict=True))
        return a, g

    def rows(self, repeats: int) -> ExampleRows | None:
        """Returns what was kept; None if nothing came by.

        Args:
            repeats: k, where the loss of every micro-batch was divided by k.
        """
        units = [calls for calls in self._units.values() if calls.a]
        if not units:
            return None
        parts = [[torch.cat(list(rows.values()), dim=2) for rows in (calls.a, calls.g)] for calls in units]
        positions = max(a.shape[2] for a, _ in parts)
        a, g = (
            torch.cat([F.pad(part[side], (0, 0, 0, positions - part[side].shape[2])) for part in parts], dim=1)
            for side in (0, 1)
        )
        return ExampleRows(
            a=a,
            g=g.mul_(repeats),
            weight=torch.cat([a.new_full((len(each.chosen),), self._weight(each)) for each in units]),
            terms=torch.cat([a.new_full((len(each.chosen),), self._terms(each)) for each in units]),
            positions=torch.cat([torch.stack(list(each.positions.values())).sum(0) for each in units]),
            frame=max(sum(each.most.values()) for each in units),
        )

    def _weight(self, calls: _Calls) -> float:
        """Returns how many examples each kept one of a unit stands for.

        The forwards of one micro-batch have one N, the first one's: their moments count by it (`Collector.add`).
        """
        seen, kept = (
            sum(sizes) for sizes in zip(*((c.examples, len(c.chosen)) for c in self._units.values()), strict=True)
        )
        return self._alike(calls)[0].averaged / calls.averaged * seen / kept

    def _terms(self, calls: _Calls) -> float:
        """Returns how many terms an example of a unit has; all of its micro-batch's forwards together have N."""
        return calls.averaged / (len(self._alike(calls)) * calls.examples)

    def _alike(self, calls: _Calls) -> list[_Calls]:
        return [each for each in self._units.values() if each.batch.whole is calls.batch.whole]

    def _draw(self, unit: Unit, examples: int, averaged: int) -> _Calls:
        drawn = [self._random.random() for _ in range(examples)]
        new = self._units[unit] = _Calls(examples, unit.batch, averaged, drawn, list(range(examples)))
        keys = sorted(key for calls in self._units.values() for key in calls.keys)
        if len(keys) > self._size:
            for calls in self._units.values():
                calls.keep(keys[self._size - 1])
        return new
