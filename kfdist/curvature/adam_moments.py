"""Adam's moments of a gradient's coordinates in some basis, which the ranks keep while owners find the next basis."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverse import AbstractPreconditioner

FIRST, SECOND, FIRST_WEIGHT, SECOND_WEIGHT = "first", "second", "first_weight", "second_weight"
"""What a block's memory keeps: m, v, and 1 - beta^t of either, by the moments' own recursion."""


@dataclass(frozen=True, kw_only=True)
class AbstractAdamBasis(AbstractPreconditioner):
    r"""A basis of orthonormal directions; the ranks keep Adam's moments of the gradient's coordinates R in it.

    Each step has, entry by entry (Kingma and Ba, arXiv 1412.6980),

        m <- beta1 m + (1 - beta1) R         v <- beta2 v + (1 - beta2) R^2
        U = back from [n / (sqrt(v / (1 - beta2^t)) + eps)]

    with n = m / (1 - beta1^t) or, with Nesterov's momentum (Dozat, 2016), (beta1 m + (1 - beta1) R) / (1 -
    beta1^(t+1)). When another basis comes into use, m is turned into it, and v becomes what `second_moment` says.

    A direction given outside a training's steps learns nothing and takes V in the place of n. Before any step it is
    `fallback`'s.

    Attributes:
        beta1: Decay of the first moment m.
        beta2: Decay of the second moment v.
        eps: Added to the root of v.
        nesterov: Whether momentum is Nesterov's.
    """

    damping_at_apply: ClassVar[bool] = True
    keeps_memory: ClassVar[bool] = True
    normalised: ClassVar[bool] = True
    solves: ClassVar[bool] = False
    nesterov: ClassVar[bool]

    beta1: float
    beta2: float
    eps: float

    @abstractmethod
    def coordinates(self, matrix: Float[Tensor, "c p q"]) -> Float[Tensor, "c p q"]:
        """Returns the coordinates of a gradient."""

    @abstractmethod
    def matrix(self, coordinates: Float[Tensor, "c p q"]) -> Float[Tensor, "c p q"]:
        """Returns the matrix that has these coordinates."""

    @abstractmethod
    def second_moment(self, before: "AbstractAdamBasis", memory: BlockMemory) -> Float[Tensor, "c p q"]:
        """Returns v in this basis, with m turned already, of v in the basis of `before`."""

    @override
    def take_over(self, before: AbstractPreconditioner, memory: BlockMemory) -> None:
        """Turns the first moment from the basis of `before` into this one, and has the second follow."""
        if not isinstance(before, type(self)) or FIRST not in memory.kept:
            return
        memory.kept[FIRST] = self.coordinates(before.matrix(memory.kept[FIRST]))
        memory.kept[SECOND] = self.second_moment(before, memory)

    @override
    def _solve(self, gradient: Tensor, damping: float, memory: BlockMemory) -> Tensor:
        R = self.coordinates(gradient)
        if memory.learns is not False:
            R = self._learn(R, memory)
        elif SECOND not in memory.kept:
            return self.fallback(gradient, damping)
        kept = memory.kept
        root = (kept[SECOND] / positive(kept[SECOND_WEIGHT])).sqrt_().add_(self.eps)
        return self.matrix(R.div_(root))

    def _learn(self, R: Tensor, memory: BlockMemory) -> Tensor:
        """Folds R into the moments, unless the step is skipped; returns the average n. R is overwritten."""
        kept = memory.kept
        if SECOND not in kept:
            kept |= {name: torch.zeros_like(R) for name in (FIRST, SECOND)}
            kept |= {name: R.new_zeros(()) for name in (FIRST_WEIGHT, SECOND_WEIGHT)}
        one = R.new_ones(())
        if isinstance(memory.learns, Tensor):
            # A skipped step has weight zero; its gradient, which may not be finite, must not be multiplied by that.
            R, one = torch.where(memory.learns, R, 0.0), memory.learns.to(R.dtype)
        fresh1, fresh2 = one * (1 - self.beta1), one * (1 - self.beta2)
        first = kept[FIRST].lerp_(R, fresh1)
        kept[SECOND].lerp_(R.square(), fresh2)
        # 1 - beta^t, by the moments' own recursion.
        first_weight = kept[FIRST_WEIGHT].lerp_(torch.ones_like(one), fresh1)
        kept[SECOND_WEIGHT].lerp_(torch.ones_like(one), fresh2)
        if not self.nesterov:
            return first / positive(first_weight)
        return torch.lerp(first, R, 1 - self.beta1).div_(torch.lerp(first_weight, torch.ones_like(one), 1 - self.beta1))


def positive(weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Keeps quotients defined before the first step that wasn't skipped."""
    return weight.clamp_min(torch.finfo(weight.dtype).tiny)
