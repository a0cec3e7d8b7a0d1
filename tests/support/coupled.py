"""A small chain of layers with the rows that it saw, and all second moments between its layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfdist.curvature.references import damping_shares
from kfdist.curvature.statistics import ChainFactors, CoarseFactors, KroneckerFactors
from tests.support.matrices import gaussian

Blocks = Sequence[Sequence[Tensor]]
"""Block (i, j) of a matrix over all layers, or of one of its factors, at [i][j]."""


@dataclass(frozen=True)
class Chain:
    """Moments A[i][j] and G[i][j] between all layers, by autograd, in float64."""

    A: list[list[Tensor]]
    G: list[list[Tensor]]

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        return [(1, len(self.G[i][i]), len(self.A[i][i])) for i in range(len(self.A))]

    def gradients(self, *, seed: int = 7) -> list[Tensor]:
        return [gaussian(*shape, seed=seed + place) for place, shape in enumerate(self.shapes)]

    def chain_factors(self, dtype: torch.dtype = torch.float64) -> dict[str, ChainFactors]:
        """The statistics of `kfac-tridiagonal`, one per layer."""
        found = {}
        for i in range(len(self.A)):
            last = i + 1 == len(self.A)
            found[f"layers.{i}"] = ChainFactors(
                A=self.A[i][i][None].to(dtype),
                G=self.G[i][i][None].to(dtype),
                A_next=(self.A[i][i][:, :0] if last else self.A[i][i + 1])[None].to(dtype),
                G_next=(self.G[i][i][:, :0] if last else self.G[i][i + 1])[None].to(dtype),
            )
        return found

    def coarse_factors(self, dtype: torch.dtype = torch.float64) -> dict[str, CoarseFactors]:
        """The statistics of `two-level`, one per layer."""
        return {
            f"layers.{i}": CoarseFactors(
                A=self.A[i][i][None].to(dtype),
                G=self.G[i][i][None].to(dtype),
                a_cross=torch.stack([each.sum() for each in self.A[i]]).to(dtype),
                g_cross=torch.stack([each.sum() for each in self.G[i]]).to(dtype),
            )
            for i in range(len(self.A))
        }

    def fisher(self) -> list[list[Tensor]]:
        """Blocks of the undamped matrix over all layers."""
        return joint_kronecker(self.A, self.G)

    def damped_fisher(self, damping: float) -> list[list[Tensor]]:
        """The same with the factors on the diagonal damped by the rule "pi"."""
        A, G = [list(row) for row in self.A], [list(row) for row in self.G]
        for i in range(len(A)):
            shares = damping_shares(A[i][i][None], G[i][i][None], rule="pi", damping=damping)
            A[i][i] = A[i][i] + shares[0] * torch.eye(len(A[i][i]), dtype=torch.float64)
            G[i][i] = G[i][i] + shares[1] * torch.eye(len(G[i][i]), dtype=torch.float64)
        return joint_kronecker(A, G)


def small_chain(widths: tuple[int, ...] = (5, 4, 3, 2), *, examples: int = 40, without_bias: int = 1) -> Chain:
    """Runs a multilayer perceptron on random data and takes the rows that each layer sees.

    Args:
        widths: Of the input and each layer's output.
        examples: N.
        without_bias: The layer that has no bias, so that chains mix both kinds.
    """
    torch.manual_seed(0)
    layers = [
        nn.Linear(d_in, d_out, bias=place != without_bias, dtype=torch.float64)
        for place, (d_in, d_out) in enumerate(zip(widths[:-1], widths[1:], strict=True))
    ]
    x, inputs, outputs = gaussian(examples, widths[0], seed=1), [], []
    for layer in layers:
        ones = torch.ones(examples, 0 if layer.bias is None else 1, dtype=torch.float64)
        inputs.append(torch.cat([x, ones], dim=1).detach())
        outputs.append(layer(x))
        x = torch.tanh(outputs[-1])
    loss = (outputs[-1] - gaussian(examples, widths[-1], seed=2)).square().sum()  # a sum: rows of per-example losses
    return Chain(cross_moments(inputs), cross_moments(torch.autograd.grad(loss, outputs)))


def chain_of_one(factors: KroneckerFactors) -> ChainFactors:
    """Returns the statistics of a layer without neighbours."""
    return ChainFactors(A=factors.A, G=factors.G, A_next=factors.A[..., :0], G_next=factors.G[..., :0])


def group_of_one(factors: KroneckerFactors) -> CoarseFactors:
    """Returns the statistics of a block that is alone in its group."""
    return CoarseFactors(A=factors.A, G=factors.G, a_cross=factors.A.sum((1, 2))[:1], g_cross=factors.G.sum((1, 2))[:1])


# The dense truth over all layers --------------------------------------------------------------------------------------


def cross_moments(rows: Sequence[Tensor]) -> list[list[Tensor]]:
    """Returns (1/N) x_i^T x_j for all pairs of layers, from their rows x_i."""
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
    """Returns R: row l is 1 on the parameters of block l and 0 elsewhere (algorithms.md 7.1)."""
    return torch.block_diag(*(torch.ones(1, size, dtype=torch.float64) for size in sizes))


def flat(parts: Sequence[Tensor]) -> Tensor:
    """Returns the vector of some gradients, row-major, one after another."""
    return torch.cat([part.double().flatten() for part in parts])
