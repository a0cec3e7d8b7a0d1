"""One block's share of the two-level inverse: its own inverse, and a coarse correction over all blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self, get_args

import torch
from torch import Tensor

from kfdist.curvature.coupled_inverse import CoupledPreconditioner
from kfdist.curvature.inverse import Memory
from kfdist.curvature.kronecker_inverse import KroneckerSpectrum

Combination = Literal["difference", "additive"]


@dataclass(frozen=True, kw_only=True)
class TwoLevelBlock(CoupledPreconditioner):
    """omega_fine B^{-1} V + omega_coarse R^T C R V, damped at apply; see `kfdist.curvature.inverters.two_level`.

    B is the block-diagonal matrix of the inner method, damped. R V sums each block's gradient to one number, and R^T
    gives that number's share back to every weight. D = R B R^T is diagonal, F_c = R F R^T isn't, and

        "difference":  C = (D + off-diagonal part of F_c)^{-1} - D^{-1}
        "additive":    C = (F_c + lambda I)^{-1}, as published.

    Attributes:
        inner: The inner method's inverse of this block.
        coarse_row: The block's row of F_c, `[L]`.
        sum_A: Sum of all entries of A as `inner` holds it, `[c]`.
        sum_G: Likewise of G, `[c]`.
        omega_fine: Weight of the inner method's direction.
        omega_coarse: Weight of the coarse correction.
        combination: "difference" or "additive".
    """

    damping_at_apply: ClassVar[bool] = True

    inner: KroneckerSpectrum
    coarse_row: Tensor
    sum_A: Tensor
    sum_G: Tensor
    omega_fine: float
    omega_coarse: float
    combination: Combination

    def __post_init__(self) -> None:
        if self.combination not in get_args(Combination):  # it may come from a wire or a file
            raise ValueError(f"combination is {self.combination!r}, must be one of {', '.join(get_args(Combination))}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (c, p, q) of the gradients it takes."""
        return self.inner.shape

    def joint_damping(self, damping: float) -> Tensor:
        """Returns the lambda, `[c]`, that `damping` amounts to in the inner method."""
        return self.inner.joint_damping(damping)

    def coarse_block(self, damping: float) -> Tensor:
        """Returns 1^T B 1, the sum of all entries of this block of the inner method's damped matrix; a scalar.

        Args:
            damping: lambda.
        """
        _, p, q = self.shape
        if self.inner.damping_rule == "common":
            return (self.sum_A * self.sum_G + damping * p * q).sum()
        damping_A, damping_G = self.inner.factor_damping(damping)
        return ((self.sum_A + damping_A * q) * (self.sum_G + damping_G * p)).sum()

    @classmethod
    def _solve_group(  # pyright: ignore[reportIncompatibleMethodOverride]  # see CoupledPreconditioner.apply_group
        cls, members: Sequence[Self], gradients: Sequence[Tensor], damping: float, memories: Sequence[Memory]
    ) -> list[Tensor]:
        each = list(zip(members, gradients, memories, strict=True))
        fine = [member.omega_fine * member.inner.apply(V, damping, memory) for member, V, memory in each]
        first = members[0]
        if first.omega_coarse == 0:
            return fine
        rows = torch.stack([member.coarse_row for member in members])
        sums = torch.stack([V.sum() for V in gradients]).double()
        if first.combination == "additive":
            coarse = _solve(rows, rows.diagonal().double() + damping, sums)
        else:
            own = torch.stack([member.coarse_block(damping) for member in members]).double()
            coarse = _solve(rows, own, sums) - sums / own
        correction = (first.omega_coarse * coarse).to(fine[0].dtype)
        return [direction + correction[place] for place, direction in enumerate(fine)]


def _solve(rows: Tensor, diagonal: Tensor, right_side: Tensor) -> Tensor:
    """Solves an L x L system in float64, without a host sync.

    Blocks differ by orders of magnitude, so it is scaled to a unit diagonal. Entries off the diagonal are reduced by
    the rounding that they went through: a matrix that is positive definite but for rounding stays so.

    Args:
        rows: Gives the entries off the diagonal, `[L, L]`.
        diagonal: Positive, `[L]`, float64.
        right_side: `[L]`, float64.
    """
    scale = diagonal.rsqrt()
    kept = 1 - 4 * len(rows) * torch.finfo(rows.dtype).eps
    matrix = kept * rows.double() * scale * scale.unsqueeze(-1)
    matrix.diagonal().fill_(1.0)
    factor, _ = torch.linalg.cholesky_ex(matrix)
    return scale * torch.cholesky_solve((scale * right_side).unsqueeze(-1), factor).squeeze(-1)
