"""Where in a parameter the entries of a tensor lie: those of a view of it, or of a copy."""

from dataclasses import dataclass

from torch import Tensor

from kfdist.capture.operations import Product
from kfdist.curvature.blocks.experts import Reach

EXPANDED, PICKED = -1, -2
"""No strides of a parameter."""


@dataclass(frozen=True)
class Geometry:
    """Where in a parameter a view of it lies.

    Attributes:
        parameter: Its id.
        shape: Of the view.
        stride: Of the view, 0 along dimensions of one entry, where it means nothing, `EXPANDED` along those that
            show one entry several times, and `PICKED` along those that have entries in any order.
        offset: Of the view's first entry from the parameter's.
    """

    parameter: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, view: Tensor, parameter: Tensor) -> "Geometry":
        """Measures a view of a parameter, or the parameter itself."""
        shape = tuple(view.shape)
        strides = zip(view.stride(), shape, strict=True)
        stride = tuple(0 if size == 1 else step or EXPANDED for step, size in strides)
        return cls(id(parameter), shape, stride, int(view.storage_offset() - parameter.storage_offset()))

    def seen_through(self, view: "Geometry", copy: Tensor) -> "Geometry | None":
        """Returns where a view of a copy of these entries lies; None where the copy is laid out in another way."""
        laid_out, stride = Geometry.of(copy, copy).stride, view.stride
        if self.stride[:1] == (PICKED,):
            if view.offset or stride[:1] != laid_out[:1]:
                return None
            laid_out, stride = (PICKED, *laid_out[1:]), (PICKED, *stride[1:])
        if laid_out != self.stride:
            return None
        return Geometry(self.parameter, view.shape, stride, self.offset + view.offset)

    @property
    def transposed(self) -> "Geometry":
        """The same entries with the last two dimensions exchanged."""
        order = (*range(len(self.shape) - 2), -1, -2)
        return Geometry(
            self.parameter, tuple(self.shape[i] for i in order), tuple(self.stride[i] for i in order), self.offset
        )

    def within(self, stack: "Geometry", product: Product, index: Tensor | None) -> Reach | None:
        """Returns which matrices of a stack are these, or the one that this is; None where it is something else.

        Args:
            stack: All of them.
            product: In which these are used.
            index: Which ones they are, where they were picked.
        """
        if self == stack:
            return Reach(ends=product.ends) if stack.shape[0] > 1 or product.ends is not None else Reach(expert=0)
        if (
            self.parameter != stack.parameter
            or self.shape[-2:] != stack.shape[1:]
            or self.stride[-2:] != stack.stride[1:]
        ):
            return None
        if len(self.shape) == 3:
            return Reach(index=index) if index is not None and self.offset == stack.offset else None
        expert, rest = divmod(self.offset - stack.offset, stack.stride[0] or 1)
        return Reach(expert=expert) if not rest and 0 <= expert < stack.shape[0] else None

    @property
    def squeezed(self) -> "Geometry":
        """The same entries without dimensions of one entry."""
        kept = [i for i, size in enumerate(self.shape) if size != 1]
        return Geometry(
            self.parameter, tuple(self.shape[i] for i in kept), tuple(self.stride[i] for i in kept), self.offset
        )

    def first_row_in(self, whole: "Geometry") -> int | None:
        """Returns which row of `whole` is the first one here, where the rows here are rows of it one after another."""
        same = self.parameter == whole.parameter and self.shape[1:] == whole.shape[1:]
        if not same or self.stride[1:] != whole.stride[1:]:
            return None
        step = whole.stride[0] or self.stride[0]
        if self.stride[0] not in (0, step):
            return None
        row, rest = divmod(self.offset - whole.offset, step) if step else (0, self.offset - whole.offset)
        return row if not rest and 0 <= row <= whole.shape[0] - self.shape[0] else None
