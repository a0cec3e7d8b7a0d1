"""What every inverted block is: a frozen dataclass of tensors with a fast `apply`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from kfdist.curvature.statistics import Samples
from kfdist.wire.records import move

Memory = dict[str, Tensor]
"""What a rank keeps for one block from step to step beside the frozen snapshot, by name: scales, the last solution. It
is equal on all ranks and checkpointed."""


@dataclass(frozen=True, kw_only=True)
class AbstractPreconditioner(ABC):
    """The damped inverse of one block, ready to be multiplied onto gradients.

    Attributes:
        trace_A: Trace of the undamped factor A, `[c]`.
        trace_G: Trace of the undamped factor G, `[c]`.
        damping_at_apply: Whether `apply` obeys its `damping`; otherwise damping was fixed at the inversion.
        calibrated: Whether the ranks measure part of it themselves while it is in use (see `calibration_sums`).
        keeps_memory: Whether a block's memory outlives the snapshot; otherwise a newer snapshot starts with none.

    The traces give `fallback` its scale. A method that knows only the trace of the whole block puts that into `trace_A`
    and 1 into `trace_G`.
    """

    damping_at_apply: ClassVar[bool]
    calibrated: ClassVar[bool] = False
    keeps_memory: ClassVar[bool] = False

    trace_A: Tensor
    trace_G: Tensor

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """Shape (c, p, q) of the gradients it takes."""

    @property
    def exchanged(self) -> bool:
        """Whether one rank computes the direction and sends it to the others, because solving is the costly part."""
        return False

    @abstractmethod
    def _solve(self, gradient: Tensor, damping: float, memory: Memory) -> Tensor:
        """Applies the inverse to a gradient of the right shape and dtype; may read and replace entries of `memory`."""

    def receive(self, direction: Tensor, memory: Memory) -> None:
        """Keeps of an exchanged direction what must be equal on all ranks; called on each, the solver included.

        Args:
            direction: As all ranks have it now, `[c, p, q]`; overwritten later.
            memory: What the block keeps from step to step.
        """
        del direction, memory

    def apply(self, gradient: Tensor, damping: float, memory: Memory | None = None) -> Tensor:
        """Multiplies the damped inverse of the block onto a gradient, without a host sync.

        Computes in the dtype of its own tensors, also under autocast.

        Args:
            gradient: V, `[c, p, q]`, on the same device.
            damping: lambda of F + lambda I; without effect where `damping_at_apply` is False.
            memory: What the block keeps from step to step; None for nothing.

        Returns:
            `[c, p, q]` in the gradient's dtype.

        Raises:
            ValueError: The gradient has another shape.
        """
        if tuple(gradient.shape) != self.shape:
            raise ValueError(f"the gradient has shape {tuple(gradient.shape)}, the preconditioner is for {self.shape}")
        with torch.autocast(gradient.device.type, enabled=False):
            memory = {} if memory is None else memory
            return self._solve(gradient.to(self.trace_A.dtype), damping, memory).to(gradient.dtype)

    @classmethod
    def apply_group(
        cls, members: Sequence[Self], gradients: Sequence[Tensor], damping: float, memories: Sequence[Memory]
    ) -> list[Tensor]:
        """Applies the inverses of a group of blocks; methods that couple blocks override it.

        Args:
            members: One per block, in the group's order.
            gradients: One per block.
            damping: lambda of F + lambda I.
            memories: One per block.

        Returns:
            One direction per block.
        """
        each = zip(members, gradients, memories, strict=True)
        return [member.apply(gradient, damping, memory) for member, gradient, memory in each]

    def calibration_sums(self, samples: Samples) -> Memory:
        """Sums over this rank's examples what the block's memory is to hold; only where `calibrated`.

        The sums are added up over the ranks and folded into the memory like statistics: M <- rho M + (1 - rho) sum,
        starting afresh where a snapshot comes into use.
        """
        raise NotImplementedError(f"{type(self).__name__} is not calibrated by the ranks; `samples` has no use here")

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
