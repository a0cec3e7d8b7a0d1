"""Small blocks of the host whose directions are Adam's in some basis: found and written in one go."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
        views: The pack's gradients, by parameter, in the parameter's shape.
    """

    pack: MomentPack
    blocks: list[Block]
    parameters: list[nn.Parameter]
    views: list[Tensor]

    def gradients(self) -> list[Tensor]:
        """Returns `.grad` of the parameters, which all have one."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def directions(self, members: list[AbstractAdamBasis], memories: list[BlockMemory]) -> list[Tensor]:
        """Returns the directions of the gradients, by parameter: the pack's own memory, until the next step."""
        foreach_copy_(self.views, self.gradients())
        self.pack.turn_to_directions(members, memories)
        return self.views


@dataclass(frozen=True, eq=False)
class _Packing:
    """Packs of some blocks.

    Attributes:
        blocks: The blocks, in order.
        settings: How the method of each was set when they were packed.
        packs: Their packs, in the same order.
    """

    blocks: list[Block]
    settings: list[tuple[Any, ...]]
    packs: list[_Packed]


@dataclass
class Together:
    """Finds the directions of blocks that are small, where what is said to torch costs more than what it computes.

    Which blocks have a gradient may differ from step to step. Once the same ones have it twice, with no others new in
    between, their moments are put side by side; until then they are treated one by one. The last two such packings are
    kept, for models that alternate.
    """

    _packings: list[_Packing] = field(default_factory=list)
    _seen: list[Block] = field(default_factory=list)
    _fit: dict[Block, bool] = field(default_factory=dict)

    def apply(self, applications: list[Application], into: dict[nn.Parameter, Tensor] | None) -> list[Application]:
        """Writes the directions of those it is for into `.grad` or, given one, a table; returns the other ones.

        What is in the table is the packs' own memory, which the next step writes over.
        """
        chosen: list[Application] = []
        others: list[Application] = []
        for each in applications:
            (chosen if self._takes(each) else others).append(each)
        packs = self._packs_of(chosen) if len(chosen) >= 2 else None
        if packs is None:
            return applications
        begin = 0
        for packed in packs:
            of_pack = chosen[begin : begin + len(packed.blocks)]
            begin += len(of_pack)
            directions = packed.directions(_members(of_pack), [each.memories[0] for each in of_pack])
            if into is None:
                foreach_copy_(packed.gradients(), directions)
            else:
                into.update(zip(packed.parameters, directions, strict=True))
        return others

    def _packs_of(self, chosen: list[Application]) -> list[_Packed] | None:
        """Returns the packs of blocks that were seen before, else None.

        A pack computes with one method's settings. After a resume with other ones, bases of before are in use beside
        new ones: where any differ from those that were packed, all are packed again.
        """
        blocks, settings = [each.blocks[0] for each in chosen], [_settings(each) for each in _members(chosen)]
        known = next((each for each in self._packings if each.blocks == blocks), None)
        if known is None and blocks != self._seen:
            self._seen = blocks
            return None
        if known is None or known.settings != settings:
            packing = _Packing(blocks, settings, _packed(chosen))
            self._packings = [each for each in self._packings if each is not known][-1:] + [packing]
            return packing.packs
        if known is not self._packings[-1]:
            self._packings.reverse()
        return known.packs

    def _takes(self, application: Application) -> bool:
        if len(application.blocks) != 1 or application.memories[0].learns is not True:
            return False
        block, inverse = application.blocks[0], application.preconditioners[0]
        if not isinstance(inverse, AbstractAdamBasis) or block.has_bias is not block.homogeneous:
            return False
        if any([part.parameter.grad is None for part in block.parts]):
            return False  # frozen in part
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
    for each, inverse in zip(chosen, _members(chosen), strict=True):
        settings, size = _settings(inverse), math.prod(inverse.shape)
        if settings != alike or size > room:
            groups.append([])
            alike, room = settings, _MOST
        groups[-1].append(each)
        room -= size
    return [_packed_group(group) for group in groups]


def _settings(inverse: AbstractAdamBasis) -> tuple[Any, ...]:
    """Returns what blocks of one pack have in common."""
    return type(inverse), inverse.beta1, inverse.beta2, inverse.eps, inverse.trace_A.dtype


def _packed_group(group: Sequence[Application]) -> _Packed:
    blocks, pack = [each.blocks[0] for each in group], MomentPack(_members(group))
    views = [part for block, V in zip(blocks, pack.gradients, strict=True) for part in block.from_matrix(V)]
    return _Packed(pack, blocks, [p for block in blocks for p in block.parameters()], views)


def _members(group: Sequence[Application]) -> list[AbstractAdamBasis]:
    members = [each.preconditioners[0] for each in group]
    return [each for each in members if isinstance(each, AbstractAdamBasis)]
