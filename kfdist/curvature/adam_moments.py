"""Adam's moments of a gradient's coordinates in some basis, which the ranks keep while owners find the next basis."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.linalg.uploads import sent

FIRST, SECOND, FIRST_WEIGHT, SECOND_WEIGHT = "first", "second", "first_weight", "second_weight"
"""What a block's memory keeps: m, v, and 1 - beta^t of either, by the moments' own recursion."""

_WEIGHTS = (FIRST_WEIGHT, SECOND_WEIGHT)


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

    The numbers 1 - beta^t are the host's, which tells a device what it makes of them; where only the device knows which
    steps are skipped, they are the device's.

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
    on_host: ClassVar[frozenset[str]] = frozenset(_WEIGHTS)
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

    def turn(self, matrix: Float[Tensor, "c p q"]) -> None:
        """Overwrites a gradient with its coordinates."""
        matrix.copy_(self.coordinates(matrix))

    def turn_back(self, coordinates: Float[Tensor, "c p q"], scale: float) -> None:
        """Overwrites coordinates with what `matrix` returns of them."""
        coordinates.copy_(self.matrix(coordinates, scale))

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
        R, kept, learns = self.coordinates(gradient), memory.kept, memory.learns is not False
        if learns:
            R = self._learn(R, memory)
        elif SECOND not in kept:
            return self.fallback(gradient, damping)
        first_weight = _known(kept[FIRST_WEIGHT], memory) if learns else None
        added, scale = self.scales(first_weight, _known(kept[SECOND_WEIGHT], memory), R.dtype)
        R.div_(kept[SECOND].sqrt().add_(added))
        return self.matrix(R.mul_(scale)) if isinstance(scale, Tensor) else self.matrix(R, scale)

    def scales(
        self,
        first_weight: Float[Tensor, ""] | float | None,
        second_weight: Float[Tensor, ""] | float,
        dtype: torch.dtype,
    ) -> tuple[Any, Any]:
        """Returns what is added to sqrt(v), and what multiplies the quotient; tensors where the weights are.

        R is n weight, and n / (sqrt(v / w) + eps) is (n weight) / (sqrt(v) + eps sqrt(w)) sqrt(w) / weight: what is one
        number is left to the product, in the place of passes over the coordinates.

        Args:
            first_weight: 1 - beta1^t; None where R is V's.
            second_weight: w.
            dtype: The moments'.
        """
        root = never_zero(second_weight, dtype) ** 0.5
        if first_weight is None:
            return self.eps * root, root
        weight = first_weight * self.beta1 + (1 - self.beta1) if self.nesterov else never_zero(first_weight, dtype)
        return self.eps * root, root / weight

    def fold(
        self, R: Float[Tensor, "..."], first: Float[Tensor, "..."], second: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Folds R into both moments of a step that isn't skipped; returns n times its weight, over R."""
        first.lerp_(R, 1 - self.beta1)
        second.mul_(self.beta2).addcmul_(R, R, value=1 - self.beta2)
        return self._momentum(R, first)

    def _momentum(self, R: Tensor, first: Tensor) -> Tensor:
        return R.lerp_(first, self.beta1) if self.nesterov else R.copy_(first)

    def _learn(self, R: Tensor, memory: BlockMemory) -> Tensor:
        """Folds R, which is overwritten, into the moments, unless the step is skipped; returns n times its weight.

        The weights of the moments, 1 - beta^t, follow the moments' own recursion.
        """
        kept, fresh1, fresh2 = memory.kept, 1 - self.beta1, 1 - self.beta2
        place = R.device if isinstance(memory.learns, Tensor) else torch.device("cpu")
        if SECOND not in kept:
            kept |= {name: torch.zeros_like(R) for name in (FIRST, SECOND)}
            kept |= {name: R.new_zeros((), device=place) for name in _WEIGHTS}
        for name in _WEIGHTS:
            if kept[name].device != place:  # at the first step after a resume, at most
                kept[name] = sent(kept[name], place)
        if not isinstance(memory.learns, Tensor):
            _fold_weights(kept, fresh1, fresh2, memory)
            return self.fold(R, kept[FIRST], kept[SECOND])
        # A skipped step has weight zero; its gradient, which may not be finite, must not be multiplied by that.
        R, learned = torch.where(memory.learns, R, 0.0), memory.learns.to(R.dtype)
        weighed1, weighed2 = learned * fresh1, learned * fresh2
        _fold_weights(kept, weighed1, weighed2, memory)
        kept[FIRST].lerp_(R, weighed1)
        kept[SECOND].lerp_(R.square(), weighed2)
        return self._momentum(R, kept[FIRST])


def next_weight(weight: float, fresh: float) -> float:
    """Returns 1 - beta^(t+1) of 1 - beta^t, with 1 - beta for `fresh`."""
    return weight + (1 - weight) * fresh


def _fold_weights(kept: dict[str, Tensor], fresh1: Tensor | float, fresh2: Tensor | float, memory: BlockMemory) -> None:
    """Brings the weights of both moments to this step."""
    one = None
    for name, fresh in ((FIRST_WEIGHT, fresh1), (SECOND_WEIGHT, fresh2)):
        weight = _known(kept[name], memory)
        if isinstance(weight, Tensor):
            one = torch.ones_like(weight) if one is None else one
            weight.lerp_(one, fresh)
        else:
            assert isinstance(fresh, float), "no tensor, where the weight is at hand"
            kept[name].fill_(next_weight(weight, fresh))


def never_zero(weight: Float[Tensor, ""] | float, dtype: torch.dtype) -> Float[Tensor, ""] | float:
    """Keeps quotients defined before the first step that wasn't skipped; the dtype is that of the moments."""
    tiny = torch.finfo(dtype).tiny
    return weight.clamp_min(tiny) if isinstance(weight, Tensor) else max(weight, tiny)


def _known(weight: Float[Tensor, ""], memory: BlockMemory) -> Float[Tensor, ""] | float:
    """Returns a weight as a number where the host has it at hand; of a step that may be skipped it has not."""
    return weight.item() if is_at_hand(weight) and not isinstance(memory.learns, Tensor) else weight


def is_at_hand(weight: Float[Tensor, ""]) -> bool:
    """Says whether the host reads a number without waiting: not on an accelerator, not of a tensor being traced."""
    return weight.device.type == "cpu" and type(weight) is Tensor
