"""CG-FAC: the direction is solved for when it is needed, from rows alone (Chen, arXiv 2101.00218; algorithms.md 5)."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from kfdist.curvature.inverse import AbstractPreconditioner, Memory
from kfdist.linalg.cg import CgSolution, conjugate_gradient
from kfdist.linalg.row_products import fisher_diagonal, fisher_product, kronecker_product

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
        warm_start: Whether to start from the last solution, kept as `memory["solution"]`.
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

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("operator", self.operator, get_args(CgOperator)),
            ("solve", self.solve, get_args(CgPlace)),
        ):
            if value not in allowed:  # it may come from a wire or a file
                raise ValueError(f"{name} is {value!r}, must be one of {', '.join(allowed)}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (c, p, q) of the gradients it takes."""
        return self.a.shape[0], self.g.shape[-1], self.a.shape[-1]

    @property
    def exchanged(self) -> bool:
        """Whether one rank solves and sends the direction to the others."""
        return self.solve == "owner"

    def receive(self, direction: Tensor, memory: Memory) -> None:
        """Keeps the direction as the next guess, so that any rank can go on from it, also after a resume."""
        if self.warm_start:
            memory["solution"] = direction.to(self.trace_A.dtype, copy=True)

    def product(self, V: Tensor, damping: float) -> Tensor:
        """Computes Op(V), `[c, p, q]`.

        Args:
            V: `[c, p, q]`.
            damping: lambda.
        """
        if self.operator == "kronecker":
            undamped = kronecker_product(self.a.flatten(1, 2), self.g.flatten(1, 2), V)
        else:
            undamped = fisher_product(self.a, self.g, V)
        return undamped.add_(V, alpha=damping)

    def diagonal(self, damping: float) -> Tensor:
        """Computes the diagonal of Op as `[c, p, q]`.

        Args:
            damping: lambda.
        """
        if self.operator == "kronecker":
            undamped = self.g.square().sum((1, 2)).unsqueeze(-1) * self.a.square().sum((1, 2)).unsqueeze(-2)
        else:
            undamped = fisher_diagonal(self.a, self.g)
        return undamped.add_(damping)

    def solution(self, gradient: Tensor, damping: float, start: Tensor | None = None) -> CgSolution:
        """Solves Op(x) = V and says how far it came; `apply` is this with the remedies.

        Args:
            gradient: V, `[c, p, q]`, in the rows' dtype.
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

    def _solve(self, gradient: Tensor, damping: float, memory: Memory) -> Tensor:
        found = self.solution(gradient, damping, memory.get("solution") if self.warm_start else None)
        useless = (found.broken & (found.iterations == 0))[:, None, None]
        direction = torch.where(useless, self.fallback(gradient, damping), found.solution)
        if self.warm_start:
            memory["solution"] = direction.clone()  # the caller may overwrite the direction
        return direction
