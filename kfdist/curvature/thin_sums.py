"""Sums of products r r^T while there are fewer rows r than they are wide: kept as rows, and never formed on the way.

A moving average of width d takes them up in one product onto itself, and reads and writes d^2 numbers once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from kfdist.linalg.arithmetic import fast_products

Columns = Int64[Tensor, " w"] | slice
"""Columns of a sum; a slice where they are evenly spaced, which costs least."""

_WIDEST = 0.5
"""Rows, by the width of their sum, beyond which the sum takes less room, or less to fold."""


@dataclass(frozen=True)
class ThinRows:
    """Rows whose products add up to a part of a sum.

    Attributes:
        rows: `[c, r, w]`.
        columns: Which w columns of the sum they are, where the others are zero; None for all.
    """

    rows: Float[Tensor, "c r w"]
    columns: Columns | None = None

    def scaled(self, factor: float | Float[Tensor, ""]) -> "ThinRows":
        """Returns rows multiplied by a factor."""
        return ThinRows(self.rows * factor, self.columns)

    def length(self) -> Float[Tensor, ""]:
        """Returns the root of the sum's trace, that is of all rows' squares: it is finite where all of the sum is."""
        return torch.linalg.vector_norm(self.rows)

    def add_to(self, total: Float[Tensor, "c d d"], *, kept: float = 1.0) -> None:
        """Multiplies a sum by `kept` and adds the products to it, in place."""
        with fast_products(total.device):
            if self.columns is None:
                total.baddbmm_(self.rows.mT, self.rows, beta=kept)
                return
            if kept != 1.0:
                total.mul_(kept)
            product = self.rows.mT @ self.rows
            if isinstance(self.columns, slice):
                total[:, self.columns, self.columns] += product
            else:
                total[:, self.columns.unsqueeze(1), self.columns] += product


class ThinSum:
    """Adds up rows of one factor in a step: as rows while they are few, as their products beyond.

    Args:
        width: Of the factor.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._rows: list[ThinRows] = []
        self._sum: Tensor | None = None

    def add(self, more: ThinRows) -> None:
        """Adds rows."""
        self._rows.append(more)
        if self._sum is not None or sum(each.rows.shape[1] for each in self._rows) > _WIDEST * self._width:
            self.add_to_sum()

    def add_to_sum(self, total: Float[Tensor, "c d d"] | None = None) -> Float[Tensor, "c d d"]:
        """Adds everything to a sum, which may be new, and holds it; returns it."""
        if self._sum is not None and total is not None:
            total += self._sum
        total = self._sum if total is None else total
        if total is None:
            like = self._rows[0].rows
            total = like.new_zeros(len(like), self._width, self._width)
        for each in self._rows:
            each.add_to(total)
        self._rows, self._sum = [], total
        return total

    @property
    def rows(self) -> Sequence[ThinRows] | None:
        """The rows; None where there is a sum instead."""
        return self._rows if self._sum is None else None
