"""Inverted blocks as plain data: frozen tensors with a fast `apply`.

A new kind is a frozen dataclass of tensors (and a few static values) and one line in `PRECONDITIONERS`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self, get_args

import torch
from torch import Tensor

from kfdist.curvature.records import move, symmetric_field
from kfdist.linalg.kronecker import (
    DampingRule,
    Spectrum,
    solve_factored,
    solve_joint,
    split_by_largest,
    split_by_trace,
)


@dataclass(frozen=True, kw_only=True)
class AbstractPreconditioner(ABC):
    """The damped inverse of one block, ready to be multiplied onto gradients.

    Attributes:
        trace_A: Trace of the undamped factor A, `[c]`.
        trace_G: Trace of the undamped factor G, `[c]`.
        damping_at_apply: Whether `apply` obeys its `damping`; otherwise damping was fixed at the inversion.
    """

    damping_at_apply: ClassVar[bool]

    trace_A: Tensor
    trace_G: Tensor

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """Shape (c, p, q) of the gradients it takes."""

    @abstractmethod
    def _solve(self, gradient: Tensor, damping: float) -> Tensor:
        """Applies the inverse to a gradient of the right shape and dtype."""

    def apply(self, gradient: Tensor, damping: float) -> Tensor:
        """Multiplies the damped inverse of the block onto a gradient, without a host sync.

        Computes in the dtype of its own tensors, also under autocast.

        Args:
            gradient: V, `[c, p, q]`, on the same device.
            damping: lambda of F + lambda I; without effect where `damping_at_apply` is False.

        Returns:
            `[c, p, q]` in the gradient's dtype.

        Raises:
            ValueError: The gradient has another shape.
        """
        if tuple(gradient.shape) != self.shape:
            raise ValueError(f"the gradient has shape {tuple(gradient.shape)}, the preconditioner is for {self.shape}")
        with torch.autocast(gradient.device.type, enabled=False):
            return self._solve(gradient.to(self.trace_A.dtype), damping).to(gradient.dtype)

    def fallback(self, gradient: Tensor, damping: float) -> Tensor:
        """Scales a gradient as if every eigenvalue of the block were the mean one: V/(lambda + tau).

        tau = tr(A) tr(G)/(p q) per group: the step keeps the size it has under `apply`; the bare gradient would be up
        to 1/lambda times off.

        Args:
            gradient: V, `[c, p, q]`.
            damping: lambda.
        """
        c, p, q = self.shape
        mean = (self.trace_A / q) * (self.trace_G / p)
        scale = self.joint_damping(damping) + mean
        return (gradient.to(mean.dtype) / scale.view(c, 1, 1)).to(gradient.dtype)

    def joint_damping(self, damping: float) -> Tensor:
        """Returns the lambda, `[c]`, that `damping` amounts to on the product of the factors; itself, normally."""
        return torch.full_like(self.trace_A, damping)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Returns it with all tensors on `device` and, if given, as `dtype`; itself if nothing changes."""
        return move(self, device, dtype)


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

    def _solve(self, gradient: Tensor, damping: float) -> Tensor:
        del damping
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

    def _solve(self, gradient: Tensor, damping: float) -> Tensor:
        A = Spectrum(self.U_A, self.w_A, self.tail_A)
        G = Spectrum(self.U_G, self.w_G, self.tail_G)
        if self.damping_rule == "common":
            return solve_joint(A, G, damping, gradient)
        return solve_factored(A, G, *self.factor_damping(damping), gradient)


PRECONDITIONERS: dict[str, type[AbstractPreconditioner]] = {
    "kronecker-inverse": KroneckerInverse,
    "kronecker-spectrum": KroneckerSpectrum,
}
"""Every kind by its name on the wire and in checkpoints."""
