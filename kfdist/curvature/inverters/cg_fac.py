"""CG-FAC: conjugate gradients on rows instead of factors (Chen, arXiv 2101.00218; algorithms.md 5)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from kfdist.curvature.inverter import AbstractInverter, Inversion, Placement
from kfdist.curvature.inverter_checks import check_choice, check_count, check_switch
from kfdist.curvature.preconditioners import AbstractPreconditioner, ConjugateGradient
from kfdist.curvature.preconditioners.conjugate_gradient import CgOperator, CgPlace
from kfdist.curvature.statistics import Needs, SampleBudget, Samples
from kfdist.errors import ConfigError
from kfdist.linalg.row_products import fisher_trace, keep_rows
from kfdist.types import BlockShape


@dataclass(frozen=True, kw_only=True)
class CgFac(AbstractInverter):
    """Keeps rows a, g of single examples and solves (F + lambda I) x = V from them at every step; there is no factor.

    F is the curvature of the batch of the last `inverse_period`, and of no other: what is free of matrices can't hold
    an average of factors (algorithms.md 5.3), so `ema_decay` has no effect. Memory is N (p + q) for the rows and 4 p q
    while solving, against p^2 + q^2 for K-FAC; a product takes 4 N p q multiplications or fewer.

    Attributes:
        operator: "kronecker" (K-FAC's A (x) G of these rows) or "block" (the exact empirical Fisher block).
        tolerance: Stop where the residual is this fraction of the gradient, Frobenius. The published code's 0.1
            (0.01 of the square).
        max_iterations: Stop after so many products; the published code's 10. Where they don't suffice, the solution is
            a truncated one, damped implicitly, and depends on this number.
        jacobi: Precondition by the operator's diagonal; one more tensor of the gradient's size.
        warm_start: Start from the direction of the step before, scaled to be never worse than 0; one more product.
        solve: "everywhere", each rank for itself on equal rows; or by the block's "owner", who sends the direction.
        examples: Most examples whose rows are kept, over all ranks.
        rows: Most rows, which counts where a layer is used at many positions; None: no limit.
    """

    name: ClassVar[str] = "cg-fac"
    statistic: ClassVar[type] = Samples
    produces: ClassVar[type[AbstractPreconditioner]] = ConjugateGradient
    placement: ClassVar[Placement] = Placement.WORKER

    operator: CgOperator = "kronecker"
    tolerance: float = 0.1
    max_iterations: int = 10
    jacobi: bool = False
    warm_start: bool = False
    solve: CgPlace = "everywhere"
    examples: int = 256
    rows: int | None = 16384

    def __post_init__(self) -> None:
        check_choice("operator", self.operator, get_args(CgOperator))
        if (
            isinstance(self.tolerance, bool)
            or not isinstance(self.tolerance, int | float)
            or not 0 < self.tolerance < 1
        ):
            raise ConfigError(
                f"{self.tolerance!r} is not allowed; must be a number between 0 and 1, the ends excluded",
                path="tolerance",
            )
        check_count("max_iterations", self.max_iterations, least=1)
        check_switch("jacobi", self.jacobi)
        check_switch("warm_start", self.warm_start)
        check_choice("solve", self.solve, get_args(CgPlace))
        check_count("examples", self.examples, least=1)
        if self.rows is not None:
            check_count("rows", self.rows, least=1)

    def needs(self, shape: BlockShape) -> Needs:
        """Wants rows and no sums."""
        del shape
        return Needs(sums=frozenset(), samples=SampleBudget(examples=self.examples, rows=self.rows))

    def invert(self, statistics: Samples, *, damping: float, previous: Mapping[str, Tensor], seed: int) -> Inversion:
        """Scales the rows by their weights; the solving is done at apply. See `AbstractInverter.invert`.

        With shares s_i = weight_i / sum of the weights, A = sum_i s_i sum_t a a^T and G = sum_i s_i sum_t g g^T / T, so
        a takes sqrt(s_i) and g sqrt(s_i / T); F = sum_i s_i vec(S_i) vec(S_i)^T, so there g alone takes sqrt(s_i).
        """
        del damping, previous, seed
        dtype = torch.promote_types(statistics.a.dtype, torch.float32)
        weight = statistics.weight.to(dtype)
        examples = weight.sum()
        used = weight > 0
        a, g = keep_rows(statistics.a.to(dtype), used), keep_rows(statistics.g.to(dtype), used)
        root = torch.where(used, weight / examples, torch.zeros_like(weight)).sqrt()[:, None, None]
        if self.operator == "kronecker":
            a, g = a * root, g * (root / statistics.positions**0.5)
            trace_A, trace_G = a.square().sum((1, 2, 3)), g.square().sum((1, 2, 3))
        else:
            g = g * root
            trace_A = fisher_trace(a, g)
            trace_G = torch.ones_like(trace_A)
        return Inversion(
            preconditioner=ConjugateGradient(
                trace_A=trace_A,
                trace_G=trace_G,
                a=a,
                g=g,
                operator=self.operator,
                tolerance=self.tolerance,
                max_iterations=self.max_iterations,
                jacobi=self.jacobi,
                warm_start=self.warm_start,
                solve=self.solve,
            )
        )

    def cost(self, shape: BlockShape) -> float:
        """Estimates 4 N p q multiplications and additions an iteration."""
        return 8.0 * self.max_iterations * self.examples * shape.groups * shape.d_out * shape.d_in
