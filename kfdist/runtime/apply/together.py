"""Small blocks of the host whose directions are Adam's in some basis: found and written in one go."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kfdist.curvature.adam_moments import AbstractAdamBasis
from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.blocks import Block
from kfdist.curvature.moment_pack import MomentPack
from kfdist.runtime.apply.directions import Application, joined_on
from kfdist.torch_internals import foreach_copy_

_MOST = 1 << 16
"""Numbers that are passed over at once: four tensors of so many, which a pass reads again, stay near the core."""


@dataclass
class _Packed:
    """Blocks whose moments are in one pack.

    Attributes:
        pack: Their moments.
        blocks: The blocks.
        parameters: All of theirs, in order.
        inputs: The pack's gradients, by parameter, in the parameter's shape.
    """

    pack: MomentPack
    blocks: list[Block]
    parameters: list[nn.Parameter]
    inputs: list[Tensor]

    def gradients(self) -> list[Tensor]:
        """Returns `.grad` of the parameters, which all have one."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def directions(self, members: list[AbstractAdamBasis], memories: list[BlockMemory]) -> list[Tensor]:
        """Returns the directions of the gradients, by parameter."""
        foreach_copy_(self.inputs, self.gradients())
        found = self.pack.directions(members, memories)
        return [part for block, U in zip(self.blocks, found, strict=True) for part in block.from_matrix(U)]


@dataclass
class Together:
    """Finds the directions of blocks that are small, where what is said to torch costs more than what it computes.

    Which blocks have a gradient may differ from step to step. Once the same ones have it twice in a row, their moments
    are put side by side; until then, and while others have it, they are treated one by one.
    """

    _packs: list[_Packed] = field(default_factory=list)
    _blocks: list[Block] = field(default_factory=list)
    _seen: list[Block] = field(default_factory=list)
    _fit: dict[Block, bool] = field(default_factory=dict)

    def apply(self, applications: list[Application], into: dict[nn.Parameter, Tensor] | None) -> list[Application]:
        """Writes the directions of those it is for into `.grad` or, given one, a table; returns the other ones."""
        chosen = [each for each in applications if self._takes(each)]
        blocks = [each.blocks[0] for each in chosen]
        if len(blocks) < 2:
            return applications
        if blocks != self._blocks:
            if blocks != self._seen:
                self._seen = blocks
                return applications
            self._blocks = blocks
            self._packs = _packed(chosen)
        begin = 0
        for packed in self._packs:
            of_pack = chosen[begin : begin + len(packed.blocks)]
            begin += len(of_pack)
            directions = packed.directions(_members(of_pack), [each.memories[0] for each in of_pack])
            if into is None:
                foreach_copy_(packed.gradients(), directions)
            else:
                into.update(zip(packed.parameters, directions, strict=True))
        return [] if len(chosen) == len(applications) else [each for each in applications if each not in chosen]

    def _takes(self, application: Application) -> bool:
        if len(application.blocks) != 1 or application.memories[0].learns is not True:
            return False
        block, inverse = application.blocks[0], application.preconditioners[0]
        if not isinstance(inverse, AbstractAdamBasis) or block.has_bias is not block.homogeneous:
            return False
        if (fits := self._fit.get(block)) is None:
            fits = self._fit[block] = _fits(block, inverse)
        return fits


def _fits(block: Block, inverse: AbstractAdamBasis) -> bool:
    """Says whether a block, as it was planned, is small, the host's, and has whole parameters that no other has."""
    parts = block.planned_parts
    if joined_on(block.weight.device) or block.routed or block.shares or not all(part.whole for part in parts):
        return False
    own, matrix = inverse.trace_A, inverse.trace_A.new_empty(inverse.shape)
    views = (
        each.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr() for each in block.from_matrix(matrix)
    )
    same_dtype = all(torch.promote_types(part.parameter.dtype, torch.float32) == own.dtype for part in parts)
    return matrix.numel() <= _MOST and same_dtype and all(views)


def _packed(chosen: Sequence[Application]) -> list[_Packed]:
    """Puts blocks whose method is set alike side by side, in order, at most `_MOST` numbers together."""
    groups: list[list[Application]] = []
    alike, room = None, 0
    for each in chosen:
        inverse = each.preconditioners[0]
        assert isinstance(inverse, AbstractAdamBasis), "which is what is chosen"
        settings, size = (
            (type(inverse), inverse.beta1, inverse.beta2, inverse.eps, inverse.trace_A.dtype),
            math.prod(inverse.shape),
        )
        if settings != alike or size > room:
            groups.append([])
            alike, room = settings, _MOST
        groups[-1].append(each)
        room -= size
    return [_packed_group(group) for group in groups]


def _packed_group(group: Sequence[Application]) -> _Packed:
    blocks, pack = [each.blocks[0] for each in group], MomentPack(_members(group))
    inputs = [part for block, V in zip(blocks, pack.gradients, strict=True) for part in block.from_matrix(V)]
    return _Packed(pack, blocks, [p for block in blocks for p in block.parameters()], inputs)


def _members(group: Sequence[Application]) -> list[AbstractAdamBasis]:
    members = [each.preconditioners[0] for each in group]
    return [each for each in members if isinstance(each, AbstractAdamBasis)]
