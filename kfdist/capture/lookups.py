"""Rows that were looked up in tables, followed to where they meet the examples.

Positions are looked up once for a batch: the gradient of what was looked up is a sum over examples. Where the rows are
added to tensors that have the examples along dim 0, the gradient of that sum is not, and there they are measured.
"""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kfdist.capture.operations import Product, looked_up
from kfdist.capture.registry import Part, Registry
from kfdist.torch_internals import base_of, changes_in_place


@dataclass
class Lookup:
    """One lookup.

    Attributes:
        product: Of the table and the numbers.
        parts: The table's blocks.
        others: What used the rows, besides sums in which they are measured.
        said: Of these.
    """

    product: Product
    parts: Sequence[Part]
    others: set[str] = field(default_factory=set)
    said: str = ""

    def measure_elsewhere(self) -> None:
        """Leaves the result of the lookup itself out."""
        for part in self.parts:
            part.elsewhere = True

    @property
    def is_measured(self) -> bool:
        """Whether its own result is measured, as far as it is known."""
        return not any(part.elsewhere for part in self.parts)


@dataclass(frozen=True)
class _Rows:
    """What a lookup gave, as it was then, or what was made of it and of constants alone."""

    tensor: weakref.ref[Tensor]
    version: int | None
    lookup: Lookup
    plain: bool


class LookupLog:
    """What was looked up in one forward; of one thread."""

    def __init__(self) -> None:
        self._rows: dict[int, _Rows] = {}

    def note(self, rows: Tensor, lookup: Lookup, *, plain: bool) -> None:
        """Notes that `rows` are those of a lookup, or (not `plain`) were made of these and of constants."""
        self._rows[id(rows)] = _Rows(weakref.ref(rows), changes_in_place(rows), lookup, plain)

    def of(self, tensor: Tensor) -> Lookup | None:
        """Returns the lookup that a tensor, or what it is a view of, was made of, besides constants."""
        found = self._of(tensor)
        return None if found is None else found.lookup

    def _of(self, tensor: Tensor) -> _Rows | None:
        for whole in (tensor, base_of(tensor)) if self._rows else ():
            found = None if whole is None else self._rows.get(id(whole))
            if found is not None and found.tensor() is whole:
                return found
        return None

    def met(
        self, pair: tuple[Tensor, Tensor] | None, output: Tensor, registry: Registry
    ) -> Iterator[tuple[Tensor, Product, Lookup | None]]:
        """Yields which of two addends are rows of a table that all examples share, and the product that the sum has.

        Args:
            pair: Both addends; None where there was no plain sum.
            output: The sum.
            registry: Knows slices of tables, which have no lookup.
        """
        for rows in pair or ():
            lookup = self.of(rows)
            found = registry.rows_of_table(rows) if lookup is None else self._shown_by(rows)
            if found is None or rows.shape[-1] != output.shape[-1] or not is_shared(rows, output):
                continue
            table, numbers = found
            if lookup is None or rows.shape != output.shape or len(numbers) != len(output):
                yield rows, looked_up(table, numbers.reshape(rows.shape[:-1]).expand(output.shape[:-1])), lookup

    def _shown_by(self, view: Tensor) -> tuple[Tensor, Tensor] | None:
        """Returns the table and the numbers of rows that a view shows all of, in their order; None if it doesn't."""
        found = self._of(view)
        if found is None or not found.plain or found.version != changes_in_place(view):
            return None
        product = found.lookup.product
        whole = view.is_contiguous() and view.numel() == product.activation.numel() * product.weight.shape[-1]
        return (product.weight, product.activation) if whole else None


def is_shared(rows: Tensor, output: Tensor) -> bool:
    """Whether all entries along dim 0 of what rows became a part of have the same ones."""
    return rows.dim() < output.dim() or (rows.dim() > 0 and rows.shape[0] == 1)
