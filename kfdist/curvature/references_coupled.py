"""Dense float64 truth of the methods that couple blocks. Slow on purpose; conventions as in `references`."""

from collections.abc import Sequence

import torch
from torch import Tensor

Blocks = Sequence[Sequence[Tensor]]
"""Block (i, j) of a matrix over all layers, or of one of its factors, at [i][j]."""


def cross_moments(rows: Sequence[Tensor]) -> list[list[Tensor]]:
    """Returns (1/N) x_i^T x_j for all pairs of layers, from rows x_i `[N, d_i]`, in float64."""
    doubles = [each.double() for each in rows]
    return [[here.mT @ there / len(here) for there in doubles] for here in doubles]


def joint_kronecker(A: Blocks, G: Blocks) -> list[list[Tensor]]:
    """Returns the blocks G_ij (x) A_ij of the approximated Fisher matrix over all layers (algorithms.md 1.1)."""
    return [[torch.kron(g, a) for a, g in zip(*pair, strict=True)] for pair in zip(A, G, strict=True)]


def dense(blocks: Blocks) -> Tensor:
    """Returns the matrix of its blocks."""
    return torch.cat([torch.cat(list(row), dim=1) for row in blocks])


def chain_inverse(F: Blocks) -> Tensor:
    """Computes Xi^T diag(Sigma_i^{-1}) Xi from the blocks with |i - j| <= 1, without any Kronecker algebra.

    Psi_i = F_{i,i+1} F_{i+1,i+1}^{-1}, Sigma_i = F_ii - Psi_i F_{i+1,i+1} Psi_i^T (algorithms.md 1.3).
    """
    count = len(F)
    Xi = [[torch.zeros_like(F[i][j]) for j in range(count)] for i in range(count)]
    inverses = [[torch.zeros_like(F[i][j]) for j in range(count)] for i in range(count)]
    for i in range(count):
        Xi[i][i] = torch.eye(len(F[i][i]), dtype=torch.float64)
        Sigma = F[i][i]
        if i + 1 < count:
            after = F[i + 1][i + 1]
            Psi = torch.linalg.solve(after, F[i][i + 1].mT).mT
            Xi[i][i + 1] = -Psi
            Sigma = Sigma - Psi @ after @ Psi.mT
        inverses[i][i] = torch.linalg.inv(Sigma)
    whole = dense(Xi)
    return whole.mT @ dense(inverses) @ whole


def restriction(sizes: Sequence[int]) -> Tensor:
    """Returns R, `[L, n]`: row l is 1 on the parameters of block l and 0 elsewhere (algorithms.md 7.1)."""
    return torch.block_diag(*(torch.ones(1, size, dtype=torch.float64) for size in sizes))


def flat(parts: Sequence[Tensor]) -> Tensor:
    """Returns the vector of some gradients, row-major, one after another, in float64."""
    return torch.cat([part.double().flatten() for part in parts])
