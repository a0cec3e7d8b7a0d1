"""K-FAC where A is diagonal: tables of embeddings (docs/decisions/0018)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverse import AbstractPreconditioner, InvertedFactors
from kfdist.curvature.inverter import AbstractInverter, Estimate, Inversion, Operation, Work
from kfdist.curvature.spectra import probes_like
from kfdist.curvature.statistics import DiagonalFactors, Needs
from kfdist.linalg.kronecker import split_by_trace
from kfdist.linalg.psd import damped_cholesky_inverse, inverse_residual, trace
from kfdist.types import BlockShape


@dataclass(frozen=True, kw_only=True)
class DiagonalInverse(InvertedFactors):
    """A diagonal inverse and a dense one: G_inv V diag(A_inv), with A_inv `[c, q]`."""

    @override
    def _solve(self, gradient: Tensor, damping: float, memory: BlockMemory) -> Tensor:
        del damping, memory
        return (self.G_inverse @ gradient).mul_(self.A_inverse.unsqueeze(-2))


@dataclass(frozen=True, kw_only=True)
class KfacDiagonal(AbstractInverter):
    """1 / (A + lambda_A) entry by entry and (G + lambda_G I)^{-1} by Cholesky; lambda_A lambda_G = lambda.

    The damping is split as that of `kfac` with the rule "pi". Blocks of tables have this method whatever the others
    have; V x V matrices are never made.
    """

    name: ClassVar[str] = "kfac-diagonal"
    statistic: ClassVar[type] = DiagonalFactors
    produces: ClassVar[type[AbstractPreconditioner]] = DiagonalInverse
    patient: ClassVar[bool] = True

    @override
    def needs(self, shape: BlockShape) -> Needs:
        del shape
        return Needs(sums=frozenset({"A_diagonal", "G"}))

    @override
    def invert(
        self, statistics: DiagonalFactors, *, damping: float, previous: Mapping[str, Tensor], seed: int
    ) -> Inversion:
        del previous
        A, G = statistics.A_diagonal, statistics.G
        if bool((A < 0).any()):
            return Inversion.failed(f"factor A has {float(A.min()):.3g} on its diagonal; frequencies can't be negative")
        trace_A, trace_G = A.sum(-1), trace(G)
        split = split_by_trace(trace_A, trace_G, d_in=A.shape[-1], d_out=G.shape[-1], damping=damping)
        G_inverse, definite = damped_cholesky_inverse(G, split[1])
        if not bool(definite.all()):
            return Inversion.failed(f"factor G plus {split[1].min():.3g} I is not positive definite")
        residual = inverse_residual(G, split[1], G_inverse, probes_like(G, seed=seed, label="G"))
        made = DiagonalInverse(
            trace_A=trace_A,
            trace_G=trace_G,
            A_inverse=torch.reciprocal(A + split[0].unsqueeze(-1)),
            G_inverse=G_inverse,
            damping_A=split[0],
            damping_G=split[1],
        )
        return Inversion(preconditioner=made, diagnostics={"residual_G": residual.max().item()})

    @override
    def estimate(self, shape: BlockShape) -> Estimate:
        """Counts the Cholesky inversion of G alone."""
        return Estimate([Work(Operation.CHOLESKY, float(shape.d_out**3))], shape.d_out**2 + shape.d_in)
