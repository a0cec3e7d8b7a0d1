"""One block's share of an inverse that couples several blocks."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverse import AbstractPreconditioner, Direction


@dataclass(frozen=True, kw_only=True)
class CoupledPreconditioner(AbstractPreconditioner):
    """One block's share of an inverse that couples all blocks of its group; only the whole group has a direction.

    Attributes:
        place: The block's place in its group, from 0.
        members: How many blocks the group has.
    """

    place: int
    members: int

    @classmethod
    @abstractmethod
    def _solve_group(
        cls, members: Sequence[Self], gradients: Sequence[Tensor], damping: float, memories: Sequence[BlockMemory]
    ) -> list[Tensor]:
        """Applies the inverse of the group to gradients of the right shapes and dtype."""

    # Members are all of the class itself, which is what Self says; pyright reads the base's Self as the base.
    @classmethod
    @override
    def directions(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        members: Sequence[Self],
        gradients: Sequence[Float[Tensor, "_ _ _"]],
        damping: float,
        memories: Sequence[BlockMemory],
    ) -> list[Direction]:
        """Multiplies the damped inverse of the group onto its gradients, without a host sync; not under autocast.

        Computes in the dtype of the members' own tensors.

        Raises:
            ValueError: Members are missing or in another order, or a gradient has another shape.
        """
        places = [member.place for member in members]
        whole = members[0].members if members else 0
        if not members or places != list(range(whole)) or any(member.members != whole for member in members):
            raise ValueError(
                f"{cls.__name__} couples the {whole} blocks of its group; got those at places {places}: "
                "use apply_group with all of them in order"
            )
        for member, gradient in zip(members, gradients, strict=True):
            if tuple(gradient.shape) != member.shape:
                raise ValueError(
                    f"the gradient at place {member.place} has shape {tuple(gradient.shape)}, "
                    f"the preconditioner is for {member.shape}"
                )
        given = [gradient.to(member.trace_A.dtype) for member, gradient in zip(members, gradients, strict=True)]
        solved = cls._solve_group(members, given, damping, memories)
        return [Direction(found.to(gradient.dtype)) for found, gradient in zip(solved, gradients, strict=True)]

    @override
    def _solve(self, gradient: Tensor, damping: float, memory: BlockMemory) -> Tensor:
        return self.apply_group([self], [gradient], damping, [memory])[0]
