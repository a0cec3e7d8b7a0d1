"""One layer's share of the block-tridiagonal inverse of a chain (algorithms.md 1.3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from kfdist.curvature.coupled_inverse import CoupledPreconditioner
from kfdist.curvature.inverse import Memory


@dataclass(frozen=True, kw_only=True)
class ChainLink(CoupledPreconditioner):
    """Sigma_i^{-1} and Psi_i of F^{-1} = Xi^T diag(Sigma_i^{-1}) Xi; damped when they were made.

    Xi has I on its diagonal and -Psi_i = -(Psi_A (x) Psi_G) at (i, i + 1).
    Sigma_i^{-1} V = K_G [(K_G^T V K_A) / (1 - s_G s_A^T)] K_A^T.

    Attributes:
        Psi_A: A_{i-1,i} A_{i,i}^{-1}, from the next layer's inputs to this one's, `[c, q, q_next]`; `[c, q, 0]` for the
            last layer.
        Psi_G: G_{i,i+1} G_{i+1,i+1}^{-1}, `[c, p, p_next]`; `[c, p, 0]` for the last layer.
        K_A: Columns with K_A K_A^T the inverse of the damped A that diagonalise Psi_A A_{i,i} Psi_A^T, `[c, q, q]`.
        s_A: That diagonal, in [0, 1), `[c, q]`.
        K_G: Likewise for G, `[c, p, p]`.
        s_G: Likewise for G, `[c, p]`.
        damping_A: lambda_A, `[c]`.
        damping_G: lambda_G, `[c]`.
    """

    damping_at_apply: ClassVar[bool] = False

    Psi_A: Tensor
    Psi_G: Tensor
    K_A: Tensor
    s_A: Tensor
    K_G: Tensor
    s_G: Tensor
    damping_A: Tensor
    damping_G: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (c, p, q) of the gradients it takes."""
        return self.K_G.shape[0], self.K_G.shape[-1], self.K_A.shape[-1]

    def joint_damping(self, damping: float) -> Tensor:
        """Returns the lambda, `[c]`, that was fixed at the inversion, whatever `damping` is now."""
        del damping
        return self.damping_A * self.damping_G

    def conditional_solve(self, gradient: Tensor) -> Tensor:
        """Computes Sigma_i^{-1} V: the block's inverse given all layers after it; not a direction by itself.

        Args:
            gradient: V, `[c, p, q]`.
        """
        remainder = 1 - self.s_G.unsqueeze(-1) * self.s_A.unsqueeze(-2)
        return self.K_G @ ((self.K_G.mT @ gradient @ self.K_A) / remainder) @ self.K_A.mT

    @classmethod
    def _solve_group(  # pyright: ignore[reportIncompatibleMethodOverride]  # see CoupledPreconditioner.apply_group
        cls, members: Sequence[Self], gradients: Sequence[Tensor], damping: float, memories: Sequence[Memory]
    ) -> list[Tensor]:
        del damping, memories
        links = list(zip(members, gradients, strict=True))
        # Xi: each layer's gradient less what the next one's tells about it.
        inner = [
            V - here.Psi_G @ V_next @ here.Psi_A.mT
            for (here, V), (_, V_next) in zip(links[:-1], links[1:], strict=True)
        ]
        solved = [member.conditional_solve(V) for member, V in zip(members, [*inner, gradients[-1]], strict=True)]
        # Xi^T: all terms come from `solved`, so there is no recursion along the chain.
        pairs = zip(members[:-1], solved[:-1], solved[1:], strict=True)
        return [solved[0], *(V_next - here.Psi_G.mT @ V @ here.Psi_A for here, V, V_next in pairs)]
