"""Directions that are made in the memory of their gradients, once their length is known."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.blocks import Block
from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.linalg.projected import ProjectedGradient


class InPlace(NamedTuple):
    """A block whose direction U = scale X isn't made yet; used like `Solved`, to be written into `.grad` only.

    Attributes:
        block: The block, whose gradient is V.
        projected: What makes X of V.
        scale: `[1]`.
        memory: The block's.
        product: <X, V>, `[1]`; None where nobody asked.
    """

    block: Block
    projected: ProjectedGradient
    scale: Tensor
    memory: BlockMemory
    product: Tensor | None

    @property
    def blocks(self) -> Sequence[Block]:
        """The block alone."""
        return (self.block,)

    @property
    def memories(self) -> Sequence[BlockMemory]:
        """Its alone."""
        return (self.memory,)

    @property
    def measured(self) -> None:
        """All of it was."""
        return None

    @property
    def clipped(self) -> bool:
        """Whether the KL clip is for it."""
        return True

    @property
    def uniform(self) -> bool:
        """Whether one number scales it."""
        return True

    def write(self, factor: Tensor | None, into: object) -> None:
        """Puts factor U into `.grad`, which `into` must leave it to; the factor is `[1]`, None for 1."""
        self.write_scaled(self.scale if factor is None else factor * self.scale, into)

    def write_scaled(self, scale: Tensor | None, into: object) -> None:
        """Puts scale X into `.grad`, which `into` must leave it to; the scale is `[1]`, None for 1."""
        assert into is None, "of directions that go elsewhere none is made like this"
        self.projected.overwrite(1.0 if scale is None else scale.item())
        self.block.written_over(*self.projected.V)


def in_place(
    block: Block, inverse: AbstractPreconditioner, damping: float, memory: BlockMemory, *, multiplied: bool
) -> InPlace | None:
    """Projects a block's gradient on the host; None where its direction is to be made as others are.

    Args:
        block: All of its matrices were measured.
        inverse: Its inverse.
        damping: lambda of F + lambda I.
        memory: What it keeps from step to step.
        multiplied: Whether the direction's product with the gradient is wanted.
    """
    form = inverse.in_place_form(damping, memory)
    if form is None or form.scale is None or not _has_gradients_of(block, form.scale.dtype):
        return None
    # Only now, since it may copy them, and the usual way would again.
    V = block.gradient_apart() if block.has_bias else (block.gradient(copied=False),)
    projected = ProjectedGradient.of(form, V)
    product = projected.product() if multiplied else None
    if multiplied and product is None:
        return None
    return InPlace(block, projected, form.scale, memory, product)


def _has_gradients_of(block: Block, dtype: torch.dtype) -> bool:
    """Says whether the block gives its gradients in a dtype."""
    gradients = [parameter.grad for parameter in block.parameters()]
    return all(each is not None and torch.promote_types(each.dtype, torch.float32) == dtype for each in gradients)
