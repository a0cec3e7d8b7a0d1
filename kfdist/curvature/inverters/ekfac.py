"""EKFAC: eigenbases on the owner, scales on the ranks (George et al., arXiv 1806.03884; algorithms.md 7.8)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from kfdist import checks
from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.curvature.inverter import AbstractInverter, Estimate, Inversion, Operation, Outcome, Work
from kfdist.curvature.spectra import EIGH_FLOPS, full_spectra
from kfdist.curvature.statistics import KroneckerFactors, Needs, SampleBudget, Samples
from kfdist.linalg.psd import trace
from kfdist.linalg.row_products import fisher_diagonal, keep_rows
from kfdist.types import BlockShape


@dataclass(frozen=True, kw_only=True)
class EkfacBasis(AbstractPreconditioner):
    """The eigenvectors of both factors; the ranks measure the second moments s along them, `[c, p, q]`.

    Q_G [(Q_G^T V Q_A) / (s + lambda)] Q_A^T with s = E_i[(Q_G^T S_i Q_A)^2], entry by entry, S_i = sum_t g_it a_it^T
    being example i's gradient. In this basis s is the diagonal that is nearest to the empirical Fisher matrix, so the
    Frobenius error is never above that of K-FAC's d_G d_A^T. The eigenvectors are columns, so the projection is Q^T on
    the left and Q on the right; one published code has them the other way round (algorithms.md 11e).

    Until something was measured the direction is `fallback`'s, never one scaled by d_G d_A^T.

    Attributes:
        Q_A: Eigenvectors of A in columns, `[c, q, q]`.
        Q_G: Eigenvectors of G in columns, `[c, p, p]`.
    """

    damping_at_apply: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True

    Q_A: Tensor
    Q_G: Tensor

    @property
    @override
    def shape(self) -> tuple[int, int, int]:
        return self.Q_A.shape[0], self.Q_G.shape[-1], self.Q_A.shape[-1]

    @override
    def spectra(self, memory: BlockMemory) -> dict[str, tuple[Tensor, int]]:
        """Returns the scales s as "scales", the eigenvalues of the block itself; nothing before they are measured."""
        if "scales" not in memory.kept or not (examples := float(memory.kept["examples"])) > 0:
            return {}
        return {"scales": (memory.kept["scales"] / examples, memory.kept["scales"].numel())}

    @override
    def calibration_sums(self, samples: Samples) -> dict[str, Tensor]:
        """Sums weight_i (Q_G^T S_i Q_A)^2 over some examples.

        Args:
            samples: Rows of this step; where the weight is 0, their values don't matter.

        Returns:
            "scales" `[c, p, q]` and "examples", N of `Samples`, a scalar. Their quotient is s.
        """
        weight = samples.weight.to(self.Q_A.dtype)
        used = weight > 0
        examples = torch.where(used, weight * samples.terms.to(weight), torch.zeros_like(weight)).sum()
        a = _rotated(keep_rows(samples.a.to(self.Q_A.dtype), used), self.Q_A)
        g = _rotated(keep_rows(samples.g.to(self.Q_G.dtype), used), self.Q_G)
        return {"scales": fisher_diagonal(a, g * weight.sqrt()[:, None, None]), "examples": examples}

    @override
    def _solve(self, gradient: Tensor, damping: float, memory: BlockMemory) -> Tensor:
        if "scales" not in memory.kept:
            return self.fallback(gradient, damping)
        sums = memory.kept["scales"], memory.kept["examples"]
        inverse = memory.form(self, lambda: self._inverse_scales(*sums, damping), damping, *sums)
        return self.Q_G @ (self.Q_G.mT @ gradient @ self.Q_A).mul_(inverse) @ self.Q_A.mT

    def _inverse_scales(self, scales: Tensor, examples: Tensor, damping: float) -> Tensor:
        """Returns 1/(s + lambda); where nothing was measured, what makes the direction `fallback`'s."""
        # The memory stays as it was folded, perhaps on another device or in another precision than a moved snapshot.
        scales, examples = scales.to(self.Q_A), examples.to(self.Q_A)
        measured = examples > 0
        scales = scales / torch.where(measured, examples, torch.ones_like(examples))
        return torch.where(measured, scales + damping, self.mean_damped(damping).view(-1, 1, 1)).reciprocal_()


def _rotated(rows: Tensor, basis: Tensor) -> Tensor:
    """Multiplies rows `[c, n, t, d]` by `[c, d, d]`; flattened, since broadcasting would copy the basis n times."""
    return (rows.flatten(1, 2) @ basis).view_as(rows)


@dataclass(frozen=True, kw_only=True)
class Ekfac(AbstractInverter):
    """Decomposes both factors for their eigenvectors alone; the ranks then measure the scales in that basis.

    Attributes:
        examples: Most examples, over all ranks, from whose gradients the scales are measured at a step.
        rows: Most rows of them, which counts where a layer is used at many positions; None: no limit.
    """

    name: ClassVar[str] = "ekfac"
    produces: ClassVar[type[AbstractPreconditioner]] = EkfacBasis

    examples: int = 256
    rows: int | None = 16384

    def __post_init__(self) -> None:
        checks.count("examples", self.examples, least=1)
        if self.rows is not None:
            checks.count("rows", self.rows, least=1)

    @override
    def needs(self, shape: BlockShape) -> Needs:
        del shape
        return Needs(calibration=SampleBudget(examples=self.examples, rows=self.rows))

    @override
    def invert(
        self, statistics: KroneckerFactors, *, damping: float, previous: Mapping[str, Tensor], seed: int
    ) -> Inversion:
        del damping, previous
        A, G = full_spectra(statistics, seed)
        return Inversion(
            preconditioner=EkfacBasis(
                trace_A=trace(statistics.A),
                trace_G=trace(statistics.G),
                Q_A=A.spectrum.vectors,
                Q_G=G.spectrum.vectors,
            ),
            outcome=Outcome.worst(A.outcome, G.outcome),
            diagnostics={**A.diagnostics, **G.diagnostics},
        )

    @override
    def estimate(self, shape: BlockShape) -> Estimate:
        """Counts two full eigendecompositions, both bases and the scales."""
        sizes = shape.d_in, shape.d_out
        work = [Work(Operation.EIGH, EIGH_FLOPS * d**3) for d in sizes]
        return Estimate(work, sum(d * d for d in sizes) + shape.d_in * shape.d_out, shape.d_in * shape.d_out)
