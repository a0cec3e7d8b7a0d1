"""Inverses of Kronecker products: dense, or by eigenpairs of the factors."""

from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from kfdist.curvature.inverse import AbstractPreconditioner, Memory
from kfdist.linalg.brand import solve_rows
from kfdist.linalg.kronecker import (
    DampingRule,
    Spectrum,
    solve_factored,
    solve_joint,
    split_by_largest,
    split_by_trace,
)
from kfdist.wire.records import symmetric_field


@dataclass(frozen=True, kw_only=True)
class KroneckerInverse(AbstractPreconditioner):
    """Two dense inverses, damped when they were made: G_inv V A_inv.

    Attributes:
        A_inverse: (A + lambda_A I)^{-1}, `[c, q, q]`.
        G_inverse: (G + lambda_G I)^{-1}, `[c, p, p]`.
        damping_A: lambda_A, `[c]`.
        damping_G: lambda_G, `[c]`.
    """

    damping_at_apply: ClassVar[bool] = False

    A_inverse: Tensor = symmetric_field()
    G_inverse: Tensor = symmetric_field()
    damping_A: Tensor
    damping_G: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (c, p, q) of the gradients it takes."""
        return self.G_inverse.shape[0], self.G_inverse.shape[-1], self.A_inverse.shape[-1]

    def joint_damping(self, damping: float) -> Tensor:
        """Returns the lambda, `[c]`, that was fixed at the inversion, whatever `damping` is now."""
        del damping
        return self.damping_A * self.damping_G

    def _solve(self, gradient: Tensor, damping: float, memory: Memory) -> Tensor:
        del damping, memory
        return self.G_inverse @ gradient @ self.A_inverse


@dataclass(frozen=True, kw_only=True)
class KroneckerSpectrum(AbstractPreconditioner):
    """Eigenpairs of both factors, all or the leading ones; damped at apply.

    Attributes:
        U_A: Eigenvectors of A in columns, `[c, q, r_A]`.
        w_A: Eigenvalues of A, descending, `[c, r_A]`.
        tail_A: Eigenvalue of A orthogonal to U_A, `[c]`; 0 without spectrum continuation.
        U_G: Eigenvectors of G in columns, `[c, p, r_G]`.
        w_G: Eigenvalues of G, descending, `[c, r_G]`.
        tail_G: Eigenvalue of G orthogonal to U_G, `[c]`.
        damping_rule: How lambda acts: "common" on products of eigenvalues, "pi" and "relative" on each factor.
    """

    damping_at_apply: ClassVar[bool] = True

    U_A: Tensor
    w_A: Tensor
    tail_A: Tensor
    U_G: Tensor
    w_G: Tensor
    tail_G: Tensor
    damping_rule: DampingRule

    def __post_init__(self) -> None:
        if self.damping_rule not in get_args(DampingRule):  # it may come from a wire or a file
            raise ValueError(
                f"damping_rule is {self.damping_rule!r}, must be one of {', '.join(get_args(DampingRule))}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (c, p, q) of the gradients it takes."""
        return self.U_G.shape[0], self.U_G.shape[-2], self.U_A.shape[-2]

    def factor_damping(self, damping: float) -> tuple[Tensor, Tensor]:
        """Returns lambda_A and lambda_G, each `[c]`, of the rules that damp each factor.

        Args:
            damping: lambda; for "relative" it is phi, the fraction of the largest eigenvalue.
        """
        if self.damping_rule == "relative":
            return split_by_largest(self.w_A[:, 0], self.w_G[:, 0], damping=damping)
        _, p, q = self.shape
        return split_by_trace(self.trace_A, self.trace_G, d_in=q, d_out=p, damping=damping)

    def joint_damping(self, damping: float) -> Tensor:
        """Returns the lambda, `[c]`, that `damping` amounts to on the product of the factors."""
        if self.damping_rule != "relative":
            return super().joint_damping(damping)
        damping_A, damping_G = self.factor_damping(damping)
        return damping_A * damping_G

    @property
    def applies_to_rows(self) -> bool:
        """Whether `apply_to_rows` exists for its damping rule: "common" doesn't split into two factors."""
        return self.damping_rule != "common"

    def apply_to_rows(self, a: Tensor, g: Tensor, examples: float, damping: float) -> Tensor:
        """Multiplies the damped inverse onto the gradient V = g^T a/N without V, without a host sync.

        Linear in p + q but for the one product of size p q that forming V takes too (algorithms.md 4.3). It equals
        `apply(V)` only where the gradient is nothing but that sum: one process, one micro-batch per step, the rows of
        the training loss's own backward pass, all of them (no positions sub-sampled, no label sampled), mean reduction,
        every use of the weight seen by the block, and V not yet clipped, unscaled, decayed or mixed with momentum. Over
        ranks or micro-batches `apply` on the averaged V is the one to call. It pays where the n rows are fewer than
        about twice r_A + r_G.

        Args:
            a: Layer inputs, homogeneous coordinate last, `[c, n, q]`.
            g: Output gradients of the per-example loss, `[c, n, p]`; n counts positions where there are several.
            examples: N.
            damping: lambda of F + lambda I.

        Returns:
            `[c, p, q]` in the dtype of `g`.

        Raises:
            ValueError: The damping rule is "common", or the rows have another shape.
        """
        c, p, q = self.shape
        n = a.shape[-2]
        if not self.applies_to_rows:
            raise ValueError(f"damping_rule {self.damping_rule!r} doesn't split into factors; call `apply`")
        if tuple(a.shape) != (c, n, q) or tuple(g.shape) != (c, n, p):
            raise ValueError(
                f"the rows have shapes {tuple(a.shape)} and {tuple(g.shape)}, must be {(c, n, q)} and {(c, n, p)}"
            )
        with torch.autocast(g.device.type, enabled=False):
            A = Spectrum(self.U_A, self.w_A, self.tail_A)
            G = Spectrum(self.U_G, self.w_G, self.tail_G)
            rows = a.to(self.U_A.dtype), g.to(self.U_G.dtype)
            return solve_rows(A, G, self.factor_damping(damping), rows, examples).to(g.dtype)

    def _solve(self, gradient: Tensor, damping: float, memory: Memory) -> Tensor:
        del memory
        A = Spectrum(self.U_A, self.w_A, self.tail_A)
        G = Spectrum(self.U_G, self.w_G, self.tail_G)
        if self.damping_rule == "common":
            return solve_joint(A, G, damping, gradient)
        return solve_factored(A, G, *self.factor_damping(damping), gradient)
