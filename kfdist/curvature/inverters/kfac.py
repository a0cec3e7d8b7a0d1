"""K-FAC with factored Tikhonov damping (Martens & Grosse, arXiv 1503.05671; convolutions: arXiv 1602.01407)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kfdist.curvature.inverter import AbstractInverter, Inversion, Outcome
from kfdist.curvature.inverter_checks import check_choice, probes_like
from kfdist.curvature.preconditioners import AbstractPreconditioner, KroneckerInverse
from kfdist.curvature.statistics import KroneckerFactors
from kfdist.linalg.kronecker import split_by_largest, split_by_trace
from kfdist.linalg.psd import damped_cholesky_inverse, inverse_residual, largest_eigenvalue, trace
from kfdist.types import BlockShape

EIGENVALUE_FLOPS = 4 / 3
"""Operations of finding the eigenvalues alone over d^3: the reduction to tridiagonal form."""


@dataclass(frozen=True, kw_only=True)
class Kfac(AbstractInverter):
    """(A + lambda_A I)^{-1} and (G + lambda_G I)^{-1} by Cholesky; lambda_A lambda_G = lambda.

    A change of damping acts from the next version on. The exact joint damping needs eigenvalues: see `kfac-eigen`.

    Attributes:
        damping_rule: "pi" (traces) or "relative" (largest eigenvalues; damping is then a fraction phi).
    """

    name: ClassVar[str] = "kfac"
    produces: ClassVar[type[AbstractPreconditioner]] = KroneckerInverse

    damping_rule: Literal["pi", "relative"] = "pi"

    def __post_init__(self) -> None:
        check_choice("damping_rule", self.damping_rule, ("pi", "relative"))

    def invert(
        self, statistics: KroneckerFactors, *, damping: float, previous: Mapping[str, Tensor], seed: int
    ) -> Inversion:
        """Inverts both damped factors; see `AbstractInverter.invert`."""
        del previous
        trace_A, trace_G = trace(statistics.A), trace(statistics.G)
        q, p = statistics.A.shape[-1], statistics.G.shape[-1]
        probes = {"A": probes_like(statistics.A, None, seed=seed, label="A")}
        probes["G"] = probes_like(statistics.G, None, seed=seed, label="G")
        if self.damping_rule == "pi":
            split = split_by_trace(trace_A, trace_G, d_in=q, d_out=p, damping=damping)
        else:
            largest = (torch.linalg.eigvalsh(matrix)[..., -1] for matrix in (statistics.A, statistics.G))
            split = split_by_largest(*largest, damping=damping)
        inverses: dict[str, Tensor] = {}
        diagnostics: dict[str, float] = {}
        for name, matrix, factor_damping in (("A", statistics.A, split[0]), ("G", statistics.G, split[1])):
            inverse, definite = damped_cholesky_inverse(matrix, factor_damping)
            if not bool(definite.all()):
                reason = f"factor {name} plus {factor_damping.min().item():.3g} I is not positive definite"
                return Inversion(preconditioner=None, outcome=Outcome.FAILED, reason=reason, diagnostics=diagnostics)
            inverses[name] = inverse
            residual = inverse_residual(matrix, factor_damping, inverse, probes[name])
            smallest = 1 / largest_eigenvalue(inverse, probes[name][..., :1]) - factor_damping
            diagnostics[f"residual_{name}"] = residual.max().item()
            diagnostics[f"smallest_eigenvalue_{name}"] = smallest.min().item()
            diagnostics[f"rank_{name}"] = float(matrix.shape[-1])
        preconditioner = KroneckerInverse(
            trace_A=trace_A,
            trace_G=trace_G,
            A_inverse=inverses["A"],
            G_inverse=inverses["G"],
            damping_A=split[0],
            damping_G=split[1],
        )
        return Inversion(preconditioner=preconditioner, diagnostics=diagnostics)

    def cost(self, shape: BlockShape) -> float:
        """Estimates d^3 operations a factor (d^3/3 to factorise, 2 d^3/3 to invert) and, if needed, its eigenvalues."""
        per_factor = 1.0 if self.damping_rule == "pi" else 1.0 + EIGENVALUE_FLOPS
        return per_factor * shape.groups * (shape.d_in**3 + shape.d_out**3)
