"""Adam's moments of a gradient's coordinates in some basis, which the ranks keep while owners find the next basis."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverse import AbstractPreconditioner

FIRST, SECOND, FIRST_WEIGHT, SECOND_WEIGHT = "first", "second", "first_weight", "second_weight"
"""What a block's memory keeps: m, v, and 1 - beta^t of either, by the moments' own recursion."""

_Weight = TypeVar("_Weight", Tensor, "Tensor | float", float)


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
        """Returns the coordinates of a gradient, in a tensor of their own."""

    @abstractmethod
    def matrix(self, coordinates: Float[Tensor, "c p q"], scale: float = 1.0) -> Float[Tensor, "c p q"]:
        """Returns `scale` times the matrix that has these coordinates."""

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
        R, kept = self.coordinates(gradient), memory.kept
        if memory.learns is False and SECOND not in kept:
            return self.fallback(gradient, damping)
        # R becomes n weight, and n / (sqrt(v / w) + eps) is (n weight) / (sqrt(v) + eps sqrt(w)) sqrt(w) / weight: what
        # is one number is left to the product, in the place of a pass over the coordinates for each.
        weight = 1.0 if memory.learns is False else self._learn(R, memory)
        root_weight = positive(_known(kept[SECOND_WEIGHT], memory)) ** 0.5
        R.div_(kept[SECOND].sqrt().add_(self.eps * root_weight))
        scale = root_weight / weight
        return self.matrix(R.mul_(scale)) if isinstance(scale, Tensor) else self.matrix(R, scale)

    def _learn(self, R: Tensor, memory: BlockMemory) -> Tensor | float:
        """Folds R into the moments, unless the step is skipped; makes of R a multiple of n, and returns of which.

        The weights of the moments, 1 - beta^t, follow the moments' own recursion.
        """
        kept, beta1, beta2 = memory.kept, self.beta1, self.beta2
        if SECOND not in kept:
            kept |= {name: torch.zeros_like(R) for name in (FIRST, SECOND)}
            kept |= {name: R.new_zeros(()) for name in (FIRST_WEIGHT, SECOND_WEIGHT)}
        first, second = kept[FIRST], kept[SECOND]
        if isinstance(memory.learns, Tensor):
            # A skipped step has weight zero; its gradient, which may not be finite, must not be multiplied by that.
            R.masked_fill_(memory.learns.logical_not(), 0.0)
            one = memory.learns.to(R.dtype)
            first.lerp_(R, one * (1 - beta1))
            second.lerp_(R.square(), one * (1 - beta2))
        else:
            one = 1.0
            first.lerp_(R, 1 - beta1)
            second.mul_(beta2).addcmul_(R, R, value=1 - beta2)
        weights = [_known(kept[name], memory) for name in (FIRST_WEIGHT, SECOND_WEIGHT)]
        new1, new2 = (w + one * (1 - beta) * (1 - w) for w, beta in zip(weights, (beta1, beta2), strict=True))
        for name, new in ((FIRST_WEIGHT, new1), (SECOND_WEIGHT, new2)):
            kept[name] = new if isinstance(new, Tensor) else kept[name].fill_(new)
        if not self.nesterov:
            R.copy_(first)
            return positive(new1)
        R.lerp_(first, beta1)
        return positive(new1 + (1 - beta1) * (1 - new1))


def positive(weight: _Weight) -> _Weight:
    """Keeps quotients defined before the first step that wasn't skipped."""
    if isinstance(weight, Tensor):
        return weight.clamp_min(torch.finfo(weight.dtype).tiny)
    return weight


def _known(weight: Float[Tensor, ""], memory: BlockMemory) -> Float[Tensor, ""] | float:
    """Returns a weight as a number where the host knows it; on a device, or of a step that may be skipped, it stays."""
    known = weight.device.type == "cpu" and not isinstance(memory.learns, Tensor)
    return weight.item() if known else weight
