"""Which block a tensor in an operation belongs to: a parameter, a view of one, or a copy that a cast made."""

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kfdist.capture.affine import Affine, Columns, Layout, lay_out
from kfdist.capture.geometry import PICKED, Geometry
from kfdist.capture.operations import Product
from kfdist.curvature.blocks import Block, EmbeddingBlock, UnitBlock
from kfdist.curvature.blocks.experts import Reach
from kfdist.torch_internals import base_of, changes_in_place


@dataclass(eq=False)
class Part:
    """A block's share of a product.

    Attributes:
        block: The block.
        rows: Of the output, which its weight makes.
        biased: Whether the block's bias was added, by the product itself or afterwards.
        reach: Which row met which expert; None for a block that isn't one of experts.
        elsewhere: Whether its output is measured where it is added to the examples, and not where it was looked up.
        alone: Whether its output is made of parameters alone, and is the same for all examples.
    """

    block: str
    rows: slice
    biased: bool
    reach: Reach | None = None
    elsewhere: bool = False
    alone: bool = False


@dataclass(frozen=True)
class _Copy:
    """A tensor with the values of a parameter, or of a view of one; with an index, of some entries along dim 0."""

    tensor: weakref.ref[Tensor]
    geometry: Geometry
    version: int | None
    index: Tensor | None = None


class Registry:
    """The parameters of some blocks, by identity.

    Args:
        blocks: The blocks; their parameters must live as long as this does.
    """

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._blocks = {block.name: block for block in blocks}
        self._parameters: dict[int, Tensor] = {}
        self._users: dict[int, list[Block]] = defaultdict(list)
        for block in self._blocks.values():
            for parameter in block.parameters():
                self._parameters[id(parameter)] = parameter
                self._users[id(parameter)].append(block)
        self._biases = {block.name: block.parts[1] for block in self._blocks.values() if block.has_bias}
        self._copies: dict[int, _Copy] = {}

    def geometry(self, tensor: Tensor) -> Geometry | None:
        """Returns where a tensor lies in a parameter; None where it is no part or copy of any."""
        for whole in (tensor, base_of(tensor)):
            if whole is None:
                continue
            parameter = self._parameters.get(id(whole))
            if parameter is not None:
                return Geometry.of(tensor, parameter)
            copy = self._copies.get(id(whole))
            if copy is not None and copy.tensor() is whole:
                view = Geometry.of(tensor, whole)
                return copy.geometry if whole is tensor else copy.geometry.seen_through(view, whole)
        return None

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter of a block, or a view or copy of one."""
        if id(tensor) in self._parameters:
            return True  # these two tell most tensors, at once
        whole = base_of(tensor)
        if not self._holds(tensor) and (whole is None or not self._holds(whole)):
            return False
        return self.geometry(tensor) is not None

    def _holds(self, whole: Tensor) -> bool:
        return id(whole) in self._parameters or id(whole) in self._copies

    def note_copy(self, copy: Tensor, source: Tensor) -> None:
        """Notes that `copy` has the values of `source`, in another type or at another place."""
        geometry = self.geometry(source)
        if geometry is not None:
            self._copies[id(copy)] = _Copy(weakref.ref(copy), geometry, changes_in_place(copy))

    def note_picked(self, copy: Tensor, source: Tensor, index: Tensor | None) -> bool:
        """Notes that `copy` has the matrices `index` of a stack, if that is so; says whether it is."""
        geometry = None if index is None else self.geometry(source)
        if index is None or geometry is None or len(geometry.shape) != 3 or self.changed(source):
            return False
        picked = Geometry(geometry.parameter, tuple(copy.shape), (PICKED, *geometry.stride[1:]), geometry.offset)
        index = index.detach() % len(source)  # also a copy
        self._copies[id(copy)] = _Copy(weakref.ref(copy), picked, changes_in_place(copy), index)
        return True

    def changed(self, tensor: Tensor) -> bool:
        """Whether a tensor is, or shows, a copy that was changed since it was made, and so has other values."""
        copy = self._copy_of(tensor)
        return copy is not None and copy[0].version != changes_in_place(copy[1])

    def _copy_of(self, tensor: Tensor) -> tuple[_Copy, Tensor] | None:
        """Returns the copy that a tensor is, or is a view of."""
        for whole in (tensor, base_of(tensor)):
            copy = None if whole is None else self._copies.get(id(whole))
            if whole is not None and copy is not None and copy.tensor() is whole:
                return copy, whole
        return None

    def users(self, tensor: Tensor) -> Iterator[tuple[str, bool]]:
        """Yields the names of the blocks that a tensor is, or shows, a parameter of, and whether as their bias."""
        geometry = self.geometry(tensor)
        if geometry is not None:
            for block in self._users[geometry.parameter]:
                yield block.name, id(block.parts[0].parameter) != geometry.parameter

    def parts(self, product: Product) -> list[Part]:
        """Returns the blocks whose weights a product multiplies with; none where it isn't what a block stands for."""
        used = self.geometry(product.weight)
        if used is None or self.changed(product.weight):
            return []
        if product.transposed:
            used = used.transposed
        found, copy = [], self._copy_of(product.weight)
        for block in self._users[used.parameter]:
            if block.operation != product.operation:
                continue
            if block.routed:
                whole = Geometry.of(block.weight, self._parameters[used.parameter])
                reach = used.within(whole, product, copy[0].index if copy else None)
                if reach is not None:
                    found.append(Part(block.name, slice(0, block.shape.d_out), False, reach))
                continue
            row = Geometry.of(block.weight, self._parameters[used.parameter]).first_row_in(used)
            if row is not None:
                rows = slice(row, row + block.weight.shape[0])
                biased = product.bias is not None and self.is_bias(product.bias, block.name, row)
                found.append(Part(block.name, rows, biased))
        return found

    def rows_of_table(self, tensor: Tensor) -> tuple[Tensor, Tensor] | None:
        """Returns the table and the numbers `[T]` of rows `[..., T, p]` of it, one after another, that a tensor shows.

        None where it shows something else, or its dimensions before the rows have more than one entry.
        """
        used = self.geometry(tensor)
        if used is None or len(used.squeezed.shape) != 2 or self.changed(tensor):
            return None
        used, whole = used.squeezed, self._parameters[used.parameter]
        row = used.first_row_in(Geometry.of(whole, whole))
        if row is None or not any(isinstance(each, EmbeddingBlock) for each in self._users[used.parameter]):
            return None
        return whole, torch.arange(row, row + used.shape[0], device=whole.device)

    def is_looked_up(self, block: str) -> bool:
        """Whether an embedding has the block's weight too, which is known not to be in it."""
        return self._blocks[block].looked_up

    def is_table(self, block: str) -> bool:
        """Whether a block is that of an embedding."""
        return isinstance(self._blocks[block], EmbeddingBlock)

    def is_bias(self, tensor: Tensor, block: str, row: int) -> bool:
        """Whether a tensor is a block's bias, or one of which the block's is a part that begins at `row`."""
        used, whole = self.geometry(tensor), self._biases.get(block)
        if used is None or whole is None or self.changed(tensor):
            return False
        first = Geometry.of(whole.of(whole.parameter), whole.parameter).first_row_in
        return any(first(each) == row for each in (used, used.squeezed) if each.shape)

    def is_bare(self, tensor: Tensor) -> bool:
        """Whether the blocks of what a tensor shows are of units, and have that parameter alone."""
        return all(self.is_of_units(name) and len(self._blocks[name].parts) == 1 for name, _ in self.users(tensor))

    def is_of_units(self, block: str) -> bool:
        """Whether a block is one of units."""
        return isinstance(self._blocks[block], UnitBlock)

    def scaled_or_shifted(self, use: Affine, output: Tensor) -> list[Columns]:
        """Returns the blocks of units that a use belongs to, and how their gradients come of the output's."""
        given = {"scale": use.scale, "shift": use.shift}
        known = {role: self.geometry(each) for role, each in given.items() if each is not None}
        owners = [block for geometry in known.values() if geometry for block in self._users[geometry.parameter]]
        found = []
        for block in dict.fromkeys(owners):
            if not isinstance(block, UnitBlock):
                continue
            roles, layouts = [], []
            for part, role in zip(block.parts, block.roles, strict=True):
                mine = [
                    each
                    for each, geometry in known.items()
                    if geometry and geometry.parameter == id(part.parameter) and role in (each, "either")
                ]
                if len(mine) == 1:
                    roles.append(mine[0])
                    layouts.append(self._layout(use, given[mine[0]], output))
            if len(roles) < len(block.parts) or not layouts[0]:
                continue
            if len(layouts) == 1 or (layouts[0].positions is None and layouts[0] == layouts[1]):
                found.append(Columns(block.name, tuple(roles), layouts[0], use.normalised, use.piece))
        return found

    def _layout(self, use: Affine, given: Tensor | None, output: Tensor) -> Layout | None:
        geometry = None if given is None else self.geometry(given)
        if given is None or geometry is None or self.changed(given):
            return None
        whole = self._parameters[geometry.parameter]
        return lay_out(use, given, geometry.stride, geometry.offset, whole=whole, output=output)

    def forget(self) -> None:
        """Forgets copies."""
        self._copies.clear()
