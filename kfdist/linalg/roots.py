"""Inverse roots of symmetric positive semi-definite matrices, by eigenvalues or by products alone."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kfdist.linalg.psd import symmetrise, trace

_MOST_ITERATIONS = 100
"""Of a coupled Newton iteration: far from the root each multiplies the smallest eigenvalue of N by at least 2, until
it is near 1, where it converges quadratically."""

_NEAR = 0.1
"""Error from which on it only falls, but for rounding."""


class Root(NamedTuple):
    """An inverse root.

    Attributes:
        matrix: M^(-1/p), exactly symmetric.
        error: Largest entry of what should be I less I when the iteration ended.
    """

    matrix: Float[Tensor, "c d d"]
    error: Float[Tensor, " c"]


def root_of_spectrum(
    values: Float[Tensor, "c d"], vectors: Float[Tensor, "c d d"], exponent: float
) -> Float[Tensor, "c d d"]:
    """Returns U diag(w^-exponent) U^T, exactly symmetric, for positive w."""
    scaled = vectors * values.pow(-exponent / 2).unsqueeze(-2)
    return symmetrise(scaled @ scaled.mT)


def newton_root(matrix: Float[Tensor, "c d d"], p: int) -> Root:
    """Computes M^(-1/p) of positive definite M by the coupled Newton iteration, products alone.

    With X_0 = I / a, N_0 = M / a^p and a^p = 2 |M| / (p + 1) it repeats T = ((p + 1) I - N) / p, X <- X T, N <- T^p N,
    until N is I (Iannazzo, SIAM J. Matrix Anal. 28(2), 2006; Guo and Higham, 28(3), 2006, (3.12); Anil et al., arXiv
    2002.09018, have it for Shampoo). The norm is Frobenius's, or the trace where that is less: both are bounds of the
    spectral one. It ends, per matrix, where the error is small and no longer falls.

    Args:
        matrix: Symmetric.
        p: From 1.
    """
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    norm = torch.minimum(torch.linalg.matrix_norm(matrix), trace(matrix))
    size = (2.0 * norm / (p + 1)).pow(1.0 / p).view(-1, 1, 1)
    X, N = identity / size, matrix / size**p
    error = _error(N, identity)
    for _ in range(_MOST_ITERATIONS):
        T = ((p + 1) * identity - N) / p
        next_X, next_N = symmetrise(X @ T), symmetrise(torch.linalg.matrix_power(T, p) @ N)
        next_error = _error(next_N, identity)
        goes_on = (next_error < error) | (error > _NEAR)
        if not bool(goes_on.any()):
            break
        X, N = (torch.where(goes_on.view(-1, 1, 1), new, old) for new, old in ((next_X, X), (next_N, N)))
        error = torch.where(goes_on, next_error, error)
    return Root(X, error)


def _error(matrix: Tensor, identity: Tensor) -> Tensor:
    return (matrix - identity).abs().amax((-2, -1))
