"""Whole parameters as tensors: what methods on gradients alone have for blocks."""

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from kfdist.curvature.blocks.base import Block, Operation, ParameterPart
from kfdist.errors import KfdistError
from kfdist.types import BlockName, BlockShape

MOST_MODES = 4


class TensorBlock(Block):
    """The block of one parameter, whatever uses it; its gradient is cut into tensors of equal size.

    A dimension longer than `most` is cut into as few pieces as that allows, all of one length, the last one filled up
    with zeros; each combination of pieces is one of the c tensors. Dimensions after the fourth are part of the fourth.

    Args:
        name: As for `Block`: the parameter's dotted name.
        module: The module that has it.
        part: All of the parameter.
        layer: That module's dotted name.
        most: Longest dimension that isn't cut.
    """

    operation = Operation("any")

    def __init__(self, name: BlockName, module: nn.Module, part: ParameterPart, layer: str, *, most: int) -> None:
        super().__init__(name, module, part, None, layer)
        self._dims = tensor_dims(part.parameter.shape)
        self._pieces = [-(-d // most) for d in self._dims]
        self._lengths = [-(-d // n) for d, n in zip(self._dims, self._pieces, strict=True)]
        self._filled = [n * s for n, s in zip(self._pieces, self._lengths, strict=True)]
        self.shape = BlockShape.of_tensors(tuple(self._lengths), math.prod(self._pieces))

    @override
    def _weight_matrix(self, weight: Tensor) -> Tensor:
        tensor = weight.reshape(self._dims)
        if self.shape.groups > 1:
            missing = [full - d for full, d in zip(self._filled, self._dims, strict=True)]
            tensor = F.pad(tensor, [side for each in reversed(missing) for side in (0, each)])
            cut = tensor.reshape([size for pair in zip(self._pieces, self._lengths, strict=True) for size in pair])
            tensor = cut.permute(*range(0, cut.dim(), 2), *range(1, cut.dim(), 2))
        return tensor.reshape(self.shape.groups, self.shape.d_out, self.shape.d_in)

    @override
    def _weight_of(self, matrix: Tensor) -> Tensor:
        tensor = matrix
        if self.shape.groups > 1:
            k = len(self._dims)
            cut = matrix.reshape(*self._pieces, *self._lengths)
            cut = cut.permute(*(place for mode in range(k) for place in (mode, k + mode)))
            tensor = cut.reshape(self._filled)[tuple(slice(d) for d in self._dims)]
        return tensor.reshape(self.parts[0].parameter.shape)

    def refuse_sparse(self) -> None:
        """Refuses a gradient whose direction would have other rows than it has.

        Raises:
            KfdistError: The gradient is sparse, as `F.embedding(..., sparse=True)` makes it.
        """
        gradient = self.parts[0].parameter.grad
        if gradient is not None and gradient.is_sparse:
            raise KfdistError(
                f"parameter {self.name!r} has a sparse gradient, which methods on gradients don't take; look it up "
                f"with sparse=False, or leave it out with skip=({self.name!r},)"
            )

    @override
    def _gradients(self) -> list[Tensor]:
        self.refuse_sparse()
        return super()._gradients()


def tensor_dims(shape: Sequence[int]) -> list[int]:
    """Returns the dimensions of a parameter as a tensor of at most four modes."""
    return [*shape[: MOST_MODES - 1], math.prod(shape[MOST_MODES - 1 :])] if len(shape) > MOST_MODES else [*shape]


def as_tensors(matrix: Float[Tensor, "c p q"], modes: Sequence[int]) -> Float[Tensor, "c ..."]:
    """Returns a block's matrices as the tensors that they are."""
    return matrix.reshape(len(matrix), *modes)
