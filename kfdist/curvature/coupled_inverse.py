"""What the preconditioners of coupled blocks have in common: one direction for a whole group."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kfdist.curvature.inverse import AbstractPreconditioner, Memory


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
        cls, members: Sequence[Self], gradients: Sequence[Tensor], damping: float, memories: Sequence[Memory]
    ) -> list[Tensor]:
        """Applies the inverse of the group to gradients of the right shapes and dtype."""

    # A class couples blocks of its own kind, which is what Self says; pyright reads the base's Self as the base.
    @classmethod
    def apply_group(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, members: Sequence[Self], gradients: Sequence[Tensor], damping: float, memories: Sequence[Memory]
    ) -> list[Tensor]:
        """Multiplies the damped inverse of the group onto its gradients, without a host sync.

        Computes in the dtype of the members' own tensors, also under autocast.

        Args:
            members: Every block of the group, in the group's order.
            gradients: One per block.
            damping: lambda of F + lambda I; without effect where `damping_at_apply` is False.
            memories: One per block.

        Returns:
            One direction per block, in its gradient's dtype.

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
        with torch.autocast(gradients[0].device.type, enabled=False):
            given = [gradient.to(member.trace_A.dtype) for member, gradient in zip(members, gradients, strict=True)]
            solved = cls._solve_group(members, given, damping, memories)
        return [direction.to(gradient.dtype) for direction, gradient in zip(solved, gradients, strict=True)]

    def _solve(self, gradient: Tensor, damping: float, memory: Memory) -> Tensor:
        return self.apply_group([self], [gradient], damping, [memory])[0]
