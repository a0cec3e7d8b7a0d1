"""Rows of one factor, kept as they are while they are few, and as a sketch of fixed size beyond."""

import torch
from torch import Tensor

from kfdist.linalg.lowrank import sketch_rows


class RowStore:
    """The rows of one step's calls of a layer.

    A batch of sequences has a hundred thousand rows, of which an increment has room for a few hundred: they are never
    held all at once. The sketch is linear, so calls add up, and E[sketch^T sketch] = rows^T rows.

    Args:
        most: Rows that are kept as they are; None keeps all.
        size: Rows of the sketch that takes their place.
        seed: Of the sketch.
    """

    def __init__(self, most: int | None, size: int, seed: int) -> None:
        self._most = most
        self._size = size
        self._seed = seed
        self._drawn = 0
        self._kept: list[Tensor] = []
        self._sketch: Tensor | None = None

    @property
    def sketched(self) -> bool:
        """Whether there were more rows than are kept."""
        return self._sketch is not None

    def add(self, rows: Tensor) -> None:
        """Adds rows `[c, n, d]`."""
        if self._sketch is None:
            self._kept.append(rows)
            if self._most is None or sum(each.shape[1] for each in self._kept) <= self._most:
                return
            waiting, self._kept = self._kept, []
        else:
            waiting = [rows]
        for each in waiting:
            found = sketch_rows(each, self._size, seed=self._seed + self._drawn)
            self._drawn += 1
            self._sketch = found if self._sketch is None else self._sketch.add_(found)

    def rows(self) -> Tensor:
        """Returns all rows, or their sketch, `[c, n, d]`."""
        return torch.cat(self._kept, dim=1) if self._sketch is None else self._sketch
