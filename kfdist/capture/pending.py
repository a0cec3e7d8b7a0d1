"""What has come of one block since the last step."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kfdist.capture.measured_call import MeasuredCall
from kfdist.capture.micro_batches import MicroBatch
from kfdist.capture.reservoir import Reservoir
from kfdist.capture.row_store import RowStore
from kfdist.capture.visits import Visit
from kfdist.curvature.thin_sums import ThinRows, ThinSum

_SKETCH_SEEDS = {"A": 0x2545F4914F6CDD1D, "G": 0x369DEA0F31A53F85}
"""Keep the sketches of a block's factors independent."""

_DRAW_MASK = (1 << 62) - 1
"""Leaves room to count the draws of a step."""


@dataclass
class PendingStatistics:
    """One block's statistics since the last step."""

    like: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)
    thin: dict[str, ThinSum] = field(default_factory=dict)
    rows: dict[str, RowStore] = field(default_factory=dict)
    reservoir: Reservoir | None = None
    positions: float | Tensor = 0.0
    calls: int = 0
    counted: dict[MicroBatch, int] = field(default_factory=dict)
    reached: dict[MicroBatch, Tensor] = field(default_factory=dict)

    @property
    def examples(self) -> float | Tensor:
        """How many examples the micro-batches had, as it is known at the end which of them are one.

        Of experts `[c]`: a micro-batch counts for those that rows of it met.
        """
        examples = {batch.whole: examples for batch, examples in self.counted.items()}
        if not self.reached:
            return sum(examples.values())
        met: dict[MicroBatch, Tensor] = {}
        for batch, experts in self.reached.items():
            met[batch.whole] = met[batch.whole] | experts if batch.whole in met else experts
        return torch.stack([experts * examples[batch] for batch, experts in met.items()]).sum(0)

    def add(self, part: str, total: Tensor) -> None:
        """Adds to a sum."""
        if part in self.sums:
            self.sums[part] += total
        else:
            self.sums[part] = total

    def add_drawn(self, part: str, seen: MeasuredCall, chosen: Tensor, of: int) -> None:
        """Adds the rows of a factor that were drawn from `of` rows."""
        if part not in self.thin:
            self.thin[part] = ThinSum(seen.block.shape.d_in if part == "A" else seen.block.shape.d_out)
        for rows in seen.drawn_rows(part, chosen, of):
            self.thin[part].add(rows)

    def thin_rows(self) -> dict[str, Sequence[ThinRows]]:
        """Returns the drawn rows by factor; where they were many, or others are summed, they go to the sums."""
        found = {}
        for part, thin in self.thin.items():
            if thin.rows is None or part in self.sums:
                self.sums[part] = thin.add_to_sum(self.sums.get(part))
            else:
                found[part] = thin.rows
        return found

    def share(self, visit: Visit, examples: int) -> float:
        """Returns what makes sums over a call's examples sums of means over forwards, where the loss is such a sum."""
        return self.counted.setdefault(visit.counted, examples) / examples

    def add_rows(self, seen: MeasuredCall) -> None:
        """Adds the rows that are asked for."""
        request = seen.request
        parts = [part for part in sorted(request.rows) if seen.first or part == "G"]
        for part in parts:
            if part not in self.rows:
                seed = request.sketch_seed ^ _SKETCH_SEEDS[part]
                self.rows[part] = RowStore(request.most_rows, request.sketch_size, seed & _DRAW_MASK)
        for tile in seen.tiles_of_rows():
            of_part: dict[str, Tensor] = dict(zip(("A", "G"), tile, strict=True))
            for part in parts:
                rows = of_part[part].flatten(1, 2)
                self.rows[part].add(rows * seen.scale_of(part, rows))
