"""CG-FAC: conjugate gradients on rows instead of factors (Chen, arXiv 2101.00218; algorithms.md 5)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from kfdist import checks
from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.curvature.inverter import AbstractInverter, Estimate, Inversion, Operation, Placement, Work
from kfdist.curvature.statistics import Needs, SampleBudget, Samples
from kfdist.linalg.cg import CgSolution, conjugate_gradient
from kfdist.linalg.row_products import fisher_diagonal, fisher_product, fisher_trace, keep_rows, kronecker_product
from kfdist.types import BlockShape

CgOperator = Literal["kronecker", "block"]
CgPlace = Literal["everywhere", "owner"]


@dataclass(frozen=True, kw_only=True)
class ConjugateGradient(AbstractPreconditioner):
    """Rows of one batch, scaled so that the operator needs no further factor, and how to solve with them.

    "kronecker": Op(V) = (g^T g) V (a^T a) + lambda V. "block": Op(V) = sum_i <S_i, V> S_i + lambda V with example i's
    gradient S_i = sum_t g_it a_it^T, the exact block of the empirical Fisher matrix.

    A truncated solution isn't linear in the gradient. If not even one step was possible (numbers that overflow), the
    direction is `fallback`'s, which has the right size, never the bare gradient (the published code's, up to 1/lambda
    times off).

    Attributes:
        a: `[c, n, t, q]`.
        g: `[c, n, t, p]`.
        operator: "kronecker" or "block".
        tolerance: Relative residual at which it stops.
        max_iterations: Steps after which it stops.
        jacobi: Whether to precondition by the operator's diagonal.
        warm_start: Whether to start from the last solution, kept in the memory as "solution".
        solve: "everywhere", or by the "owner", who sends the direction to the other ranks.
    """

    damping_at_apply: ClassVar[bool] = True
    keeps_memory: ClassVar[bool] = True

    a: Tensor
    g: Tensor
    operator: CgOperator
    tolerance: float
    max_iterations: int
    jacobi: bool
    warm_start: bool
    solve: CgPlace

    @property
    @override
    def shape(self) -> tuple[int, int, int]:
        return self.a.shape[0], self.g.shape[-1], self.a.shape[-1]

    @property
    @override
    def exchanged(self) -> bool:
        return self.solve == "owner"

    @override
    def receive(self, direction: Float[Tensor, "c p q"], memory: BlockMemory) -> None:
        """Keeps the direction as the next guess, so that any rank can go on from it, also after a resume."""
        if self.warm_start:
            memory.kept["solution"] = direction.to(self.trace_A.dtype, copy=True)

    def product(self, V: Float[Tensor, "c p q"], damping: float) -> Float[Tensor, "c p q"]:
        """Computes Op(V), damped by lambda."""
        if self.operator == "kronecker":
            undamped = kronecker_product(self.a.flatten(1, 2), self.g.flatten(1, 2), V)
        else:
            undamped = fisher_product(self.a, self.g, V)
        return undamped.add_(V, alpha=damping)

    def diagonal(self, damping: float) -> Float[Tensor, "c p q"]:
        """Computes the diagonal of Op, damped by lambda, in the shape of V."""
        if self.operator == "kronecker":
            undamped = self.g.square().sum((1, 2)).unsqueeze(-1) * self.a.square().sum((1, 2)).unsqueeze(-2)
        else:
            undamped = fisher_diagonal(self.a, self.g)
        return undamped.add_(damping)

    def solution(
        self, gradient: Float[Tensor, "c p q"], damping: float, start: Float[Tensor, "c p q"] | None = None
    ) -> CgSolution:
        """Solves Op(x) = V and says how far it came; `apply` is this with the remedies.

        Args:
            gradient: V, in the rows' dtype.
            damping: lambda.
            start: A guess; see `kfdist.linalg.cg.conjugate_gradient`.
        """
        return conjugate_gradient(
            lambda V: self.product(V, damping),
            gradient,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            start=start,
            inverse_diagonal=self.diagonal(damping).reciprocal_() if self.jacobi else None,
        )

    @override
    def _solve(self, gradient: Tensor, damping: float, memory: BlockMemory) -> Tensor:
        found = self.solution(gradient, damping, memory.kept.get("solution") if self.warm_start else None)
        useless = (found.broken & (found.iterations == 0))[:, None, None]
        direction = torch.where(useless, self.fallback(gradient, damping), found.solution)
        if self.warm_start:
            memory.kept["solution"] = direction.clone()  # the caller may overwrite the direction
        return direction


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
        max_iterations: Most products; the published code's 10. Where they don't suffice, the solution is
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
        checks.choice("operator", self.operator, get_args(CgOperator))
        checks.number("tolerance", self.tolerance, above=0, below=1)
        checks.count("max_iterations", self.max_iterations, least=1)
        checks.switch("jacobi", self.jacobi)
        checks.switch("warm_start", self.warm_start)
        checks.choice("solve", self.solve, get_args(CgPlace))
        checks.count("examples", self.examples, least=1)
        if self.rows is not None:
            checks.count("rows", self.rows, least=1)

    @override
    def needs(self, shape: BlockShape) -> Needs:
        del shape
        pooled = self.operator == "kronecker"
        budget = SampleBudget(examples=self.examples, rows=self.rows, pooled=pooled)
        return Needs(sums=frozenset(), samples=budget)

    @override
    def invert(self, statistics: Samples, *, damping: float, previous: Mapping[str, Tensor], seed: int) -> Inversion:
        """Scales the rows by their weights; the solving is done at apply. See `AbstractInverter.invert`.

        With w_i = weight_i, and N and T_i as `Samples` has them, A = sum_i w_i sum_t a a^T / N and G = sum_i w_i sum_t
        g g^T / sum_i w_i T_i, so a takes sqrt(w_i / N) and g sqrt(w_i / sum_i w_i T_i); F = sum_i w_i vec(S_i)
        vec(S_i)^T / N, so there g alone takes sqrt(w_i / N).
        """
        del damping, previous, seed
        dtype = torch.promote_types(statistics.a.dtype, torch.float32)
        weight = statistics.weight.to(dtype)
        used = weight > 0
        a, g = keep_rows(statistics.a.to(dtype), used), keep_rows(statistics.g.to(dtype), used)
        root = _root_of_shares(weight, statistics.examples.to(dtype))
        if self.operator == "kronecker":
            positions = torch.where(used, weight * statistics.positions.to(dtype), torch.zeros_like(weight))
            a, g = a * root, g * _root_of_shares(weight, positions.sum())
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

    @override
    def estimate(self, shape: BlockShape) -> Estimate:
        """Counts 4 N p q multiplications and additions an iteration; the rows, and with a warm start the direction."""
        p, q = shape.d_out, shape.d_in
        rows = self.rows if shape.convolution and self.rows is not None else self.examples
        numbers = rows * (p + q) + (p * q if self.warm_start else 0)
        return Estimate([Work(Operation.PRODUCTS, 8.0 * self.max_iterations * self.examples * p * q)], numbers)


def _root_of_shares(weight: Tensor, whole: Tensor) -> Tensor:
    """Returns sqrt(weight / whole) beside rows `[c, n, t, d]`; 0 where the weight is."""
    return torch.where(weight > 0, weight / whole, torch.zeros_like(weight)).sqrt()[:, None, None]
