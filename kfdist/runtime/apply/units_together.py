"""Blocks of single units of one shape, such as the norms of a model: their directions are found and written together.

Such a block is a few hundred numbers, for which ten operations take longer than what they compute.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.blocks import Block
from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.curvature.inverters.unit_wise import UnitWiseInverse
from kfdist.torch_internals import foreach_copy_


class UnitsInUse(NamedTuple):
    """One block, with what is multiplied onto its gradient.

    Attributes:
        block: The block, all of whose parts have a gradient.
        inverse: Its inverse.
        memory: What it keeps from step to step.
        damping: lambda.
    """

    block: Block
    inverse: UnitWiseInverse
    memory: BlockMemory
    damping: float


class UnitsSolved(NamedTuple):
    """The directions of several blocks; used like one `Solved` of all of them.

    Attributes:
        blocks: The blocks.
        memories: Theirs.
        X: `[k, blocks, c]`, by part; V where nothing was measured.
        measured: Which of the blocks were ever measured, `[blocks]`; None for all.
        product: <X, V> of each, `[blocks]`; None where nobody asked.
    """

    blocks: Sequence[Block]
    memories: Sequence[BlockMemory]
    X: Float[Tensor, "k blocks c"]
    measured: Bool[Tensor, " blocks"] | None
    product: Float[Tensor, " blocks"] | None

    @property
    def scale(self) -> None:
        """Nothing is left to multiply."""
        return None

    @property
    def clipped(self) -> bool:
        """Whether the KL clip is for them."""
        return UnitWiseInverse.solves

    @property
    def uniform(self) -> bool:
        """Whether one number scales all of a block."""
        return True

    def write(self, factor: Tensor | None, into: dict[nn.Parameter, Tensor] | None) -> None:
        """Puts factor X into `.grad` or, given one, a table; what was never measured keeps V. The factor is `[1]`."""
        scale = None if factor is None else factor.expand(len(self.blocks))
        if scale is not None and self.measured is not None:
            scale = torch.where(self.measured, scale, 1.0)
        self.write_scaled(scale, into)

    def write_scaled(self, scale: Float[Tensor, " blocks"] | None, into: dict[nn.Parameter, Tensor] | None) -> None:
        """Puts scale X into `.grad` or, given one, a table of directions."""
        U = self.X if scale is None else self.X * scale.to(self.X.dtype).view(1, -1, 1)
        parameters = _by_part(self.blocks)
        found = [row.view(parameter.shape) for row, parameter in zip(U.flatten(0, 1).unbind(), parameters, strict=True)]
        if into is None:
            foreach_copy_(_gradients(parameters), found)
        else:
            into.update(zip(parameters, found, strict=True))


@dataclass(frozen=True, eq=False)
class _SideBySide:
    """The inverses of some blocks in one tensor.

    Attributes:
        made_of: Each block's inverse, and whether it was ever measured, as they were then.
        inverse: `[k, k, blocks, c]`.
        measured: `[blocks]`; None where all were.
    """

    made_of: Sequence[Tensor | None]
    inverse: Float[Tensor, "k k blocks c"]
    measured: Bool[Tensor, " blocks"] | None

    @classmethod
    def of(cls, inverses: Sequence[Float[Tensor, "c k k"]], measured: Sequence[Tensor | None]) -> "_SideBySide":
        """Puts them side by side."""
        inverse, known = torch.stack(list(inverses)).permute(2, 3, 0, 1).contiguous(), None
        if any(each is not None for each in measured):
            true = torch.ones((), dtype=torch.bool, device=inverse.device)
            known = torch.stack([true if each is None else each for each in measured])
        return cls([*inverses, *measured], inverse, known)


@dataclass
class UnitsTogether:
    """Solves blocks of units, those of one shape at once; what is made of their inverses is kept until one changes."""

    _known: dict[tuple[object, ...], _SideBySide] = field(default_factory=dict)

    def solve(self, members: Sequence[UnitsInUse], *, multiplied: bool) -> list[UnitsSolved]:
        """Returns the directions of all of them; `.grad` stays as it is.

        Args:
            members: Blocks that `fit`.
            multiplied: Whether their products with the gradients are wanted.
        """
        groups: dict[tuple[object, ...], list[UnitsInUse]] = {}
        for each in members:
            F, shape = each.inverse.F, each.block.shape
            groups.setdefault((F.device, F.dtype, shape.groups, shape.d_in), []).append(each)
        return [self._solved(alike, group, multiplied=multiplied) for alike, group in groups.items()]

    def _solved(self, alike: tuple[object, ...], group: Sequence[UnitsInUse], *, multiplied: bool) -> UnitsSolved:
        inverses = [inverse.damped(damping, memory) for _, inverse, memory, damping in group]
        made_of = [*inverses, *(each.memory.measured for each in group)]
        known = self._known.get(alike)
        if known is None or not _are_same(known.made_of, made_of):
            known = self._known[alike] = _SideBySide.of(inverses, made_of[len(group) :])
        blocks = [each.block for each in group]
        V = torch.stack([each.reshape(-1) for each in _gradients(_by_part(blocks))]).unflatten(0, (-1, len(blocks)))
        X = (known.inverse * V).sum(1).to(V.dtype)
        if known.measured is not None:
            X = torch.where(known.measured.view(1, -1, 1), X, V)
        product = (X * V).sum((0, 2)) if multiplied else None
        return UnitsSolved(blocks, [each.memory for each in group], X, known.measured, product)


def fit(block: Block, inverse: AbstractPreconditioner) -> bool:
    """Says whether a block is one of units that `UnitsTogether` is for: whole parameters, with gradients as F has them.

    Not one that shares numbers of a parameter: what is written over its gradient would be in the midst of the other's.
    """
    if not isinstance(inverse, UnitWiseInverse) or block.shares:
        return False
    gradients = [part.parameter.grad if part.whole else None for part in block.parts]
    return all([each is not None and not each.is_sparse and each.dtype == inverse.F.dtype for each in gradients])


def _by_part(blocks: Sequence[Block]) -> list[nn.Parameter]:
    """Returns the parameters of all blocks' first parts, and then of their second ones."""
    return [part.parameter for parts in zip(*[block.parts for block in blocks], strict=True) for part in parts]


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Returns `.grad` of parameters that all have one; it has a graph only after a backward that makes one."""
    found = [each.grad for each in parameters if each.grad is not None]
    return [each.detach() if each.requires_grad else each for each in found]


def _are_same(some: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    return len(some) == len(others) and all([one is other for one, other in zip(some, others, strict=True)])
