"""Triangular factors of Gram matrices, by which columns become orthonormal in products alone.

With C = E^T E = R^T R by Cholesky, Q = E R^{-1} has orthonormal columns: 3/2 of the operations of one product of E's
size and width, where Householder reflections take 4 at the rate of narrow ones. Summed in float64, C costs float32
columns nothing: what is lost is known before Q is made.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kfdist.linalg.arithmetic import product_precision

LOSS_TOLERANCE = 10.0
"""Loss of orthogonality that is expected of products, a column in the mean, in units of rounding, up to which they are
used: what 200 of Brand's updates lose stays below 1e-4 in float32."""

_ROWS = 64
"""Rows of a Gram matrix that are computed at once: of each such block, what is above the diagonal is left out."""

_SUMMED = 768
"""Entries of the columns that are converted to float64 at once: few enough to stay in a processor's cache."""


class Triangle(NamedTuple):
    """R with E = Q R, and what making Q = E R^+ costs.

    Attributes:
        R: Upper triangular, or of full rank and as wide as E, float64.
        inverse: R^+, float64.
        growth: k = ||D R^+|| / sqrt(m), Frobenius, D the lengths of E's columns, m those of Q.
    """

    R: Float[Tensor, "*c m n"]
    inverse: Float[Tensor, "*c n m"]
    growth: Float[Tensor, "*c"]

    @classmethod
    def of(
        cls, R: Float[Tensor, "*c m n"], inverse: Float[Tensor, "*c n m"], gram: Float[Tensor, "*c n n"]
    ) -> "Triangle":
        """Measures what R^+ makes grow of the columns with that Gram matrix."""
        sizes = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        growth = torch.linalg.matrix_norm(sizes.unsqueeze(-1) * inverse) / max(inverse.shape[-1], 1) ** 0.5
        return cls(R, inverse, growth)

    def loses_at_most(self, tolerance: float, dtype: torch.dtype) -> bool:
        """Says whether Q is orthogonal but for so many units of rounding; waits for the tensors.

        Rounding of E R^+ costs a column eps k, and that of the Gram matrix its own eps k^2.
        """
        eps = torch.finfo(dtype).eps
        loss = eps * self.growth + torch.finfo(self.inverse.dtype).eps * self.growth.square()
        return bool((loss <= tolerance * eps).all())


def gram(columns: Float[Tensor, "*c d n"]) -> Float[Tensor, "*c n n"]:
    """Returns the lower triangle of E^T E in float64; above it are zeros, but for parts of the diagonal blocks."""
    n = columns.shape[-1]
    total = columns.new_zeros(*columns.shape[:-2], n, n, dtype=torch.float64)
    for some in columns.mT.split(_SUMMED, dim=-1):
        rows = some.double()
        for begin in range(0, n, _ROWS):
            total[..., begin:, begin : begin + _ROWS] += rows[..., begin:, :] @ rows[..., begin : begin + _ROWS, :].mT
    return total


def products_are_exact(device: torch.device) -> bool:
    """Says whether products of float32 round as float32 on a device.

    Where torch may take shorter numbers (`torch.set_float32_matmul_precision`), columns lose more than `loses_at_most`
    foretells.
    """
    return product_precision(device) == "ieee"


def cholesky(gram: Float[Tensor, "*c n n"]) -> Triangle | None:
    """Factorises Gram matrices, of which the lower triangle is read; None where one isn't positive definite."""
    lower, info = torch.linalg.cholesky_ex(gram)
    if bool(info.any()):
        return None
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return Triangle.of(lower.mT, torch.linalg.solve_triangular(lower.mT, unit.expand_as(gram), upper=True), gram)
