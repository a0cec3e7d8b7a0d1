"""Tensors by their modes: unfolding, second moments, and products with a matrix along each mode.

Tensors have one leading batch dimension c, which is no mode.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor


def unfolded(tensor: Float[Tensor, "c ..."], mode: int) -> Float[Tensor, "c p rest"]:
    """Returns the tensors as matrices whose rows are a mode, the first being 0; a view where possible."""
    return tensor.movedim(mode + 1, 1).flatten(2) if tensor.dim() > 2 else tensor.unsqueeze(-1)


def mode_moment(tensor: Float[Tensor, "c ..."], mode: int) -> Float[Tensor, "c p p"]:
    """Returns X X^T of the tensors unfolded along a mode."""
    matrix = unfolded(tensor, mode)
    return matrix @ matrix.mT


def mode_product(tensor: Float[Tensor, "c ..."], matrix: Float[Tensor, "c _ _"], mode: int) -> Float[Tensor, "c ..."]:
    """Multiplies a matrix onto one mode, the first being 0, of which the product has as many as the matrix has rows."""
    product = matrix @ unfolded(tensor, mode)
    rest = [size for place, size in enumerate(tensor.shape) if place not in (0, mode + 1)]
    return product.reshape(len(product), product.shape[1], *rest).movedim(1, mode + 1)


def mode_products(tensor: Float[Tensor, "c ..."], matrices: Sequence[Float[Tensor, "c _ _"]]) -> Float[Tensor, "c ..."]:
    """Multiplies a matrix onto each mode: entry (a, b, ...) becomes the sum of M_1[a, i] M_2[b, j] ... X[i, j, ...]."""
    for mode, matrix in enumerate(matrices):
        tensor = mode_product(tensor, matrix, mode)
    return tensor
