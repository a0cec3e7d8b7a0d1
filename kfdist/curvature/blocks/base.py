"""A block of the curvature: whose parameters it has, and their gradients as matrices."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kfdist.types import BlockName, BlockShape

ALIGNMENT = 64
"""Bytes; torch's own tensors begin at a multiple of it."""


@dataclass(frozen=True)
class ParameterPart:
    """What of a parameter belongs to a block.

    Attributes:
        attribute: The parameter's name in its module.
        parameter: The parameter.
        rows: Of dim 0; None for all.
        transposed: Whether the block has the transpose of that.
        fold: Of a parameter of more dimensions that is one matrix, how many of them its rows have.
    """

    attribute: str
    parameter: nn.Parameter
    rows: slice | None = None
    transposed: bool = False
    fold: int | None = None

    @classmethod
    def weight_of(cls, module: nn.Module, *, transposed: bool = False) -> "ParameterPart":
        """Returns a module's whole weight."""
        weight = module.weight
        assert isinstance(weight, nn.Parameter), "make_blocks lets no other weight through"
        return cls("weight", weight, transposed=transposed)

    @property
    def whole(self) -> bool:
        """Whether it is all of the parameter, in the parameter's own shape."""
        return self.rows is None and self.fold is None and not self.transposed

    def overlaps(self, other: "ParameterPart") -> bool:
        """Says whether some numbers of a parameter belong to both."""
        if self.parameter is not other.parameter:
            return False
        if self.rows is None or other.rows is None:
            return True
        mine, theirs = (range(len(self.parameter))[rows] for rows in (self.rows, other.rows))
        return max(mine.start, theirs.start) < min(mine.stop, theirs.stop)

    def of(self, tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Returns the block's part of a tensor shaped like the parameter, as a view."""
        part = tensor if self.rows is None else tensor[self.rows]
        if self.fold is not None:
            part = part.reshape(part.shape[: self.fold].numel(), -1)
        return part.mT if self.transposed else part

    def write(
        self, tensor: Float[Tensor, "..."], new: Float[Tensor, "..."], scale: Float[Tensor, ""] | None = None
    ) -> None:
        """Overwrites the block's part of a tensor shaped like the parameter, with `scale` times something if given."""
        target = tensor
        if self.fold is None:
            target = self.of(tensor)
        else:
            new = (new.mT if self.transposed else new).reshape(tensor.shape)
        if scale is None:
            target.copy_(new)
        else:
            torch.mul(new, scale, out=target)


@dataclass(frozen=True)
class Operation:
    """A kind of product y = W x, with all that it is told besides tensors; equal for the same function of x and W.

    Attributes:
        kind: "linear", "convolution", "transposed convolution", or of tables "lookup", "bag, sum" or "bag, mean".
        stride: Of a convolution, one number per spatial dimension, like all of these.
        padding: Numbers, or "same" or "valid".
        dilation: Its gaps.
        groups: Its groups.
    """

    kind: str
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1


class Block:
    """One diagonal block of the curvature: parts of a module's parameters, as c matrices [p, q], and their gradients.

    Attributes:
        name: Dotted name of the layer, or of its part where a layer has several blocks.
        layer: Dotted name of the module that has the parameters.
        module: That module.
        parts: The weight's part of the module's parameters and, if the block has one, the bias's.
        planned_parts: Those that it was made with; `keep_bias` leaves out the bias's.
        homogeneous: Whether rows a end in a homogeneous coordinate; also where the bias was left out since.
        shape: Of the block's gradient, as c matrices [p, q].
        operation: In which the weight is used.
        routed: Whether each row meets one of the c matrices (`ExpertsBlock`).
        maskable: Whether its batched activations are `[N, T, q]`, of which a mask can leave out rows.
        looked_up: Whether an embedding has the same weight: what is looked up enters the gradient, and not the block.
        shares: Whether another block has some of the same numbers, as of layers that have one bias (`note_shared`).

    Args:
        name: As above.
        module: As above.
        weight: The weight's part.
        bias: The bias's; None where the block has none.
        layer: As above; the same as `name` if not given.
    """

    routed: ClassVar[bool] = False
    maskable: ClassVar[bool] = False

    shape: BlockShape
    operation: Operation

    def __init__(
        self,
        name: BlockName,
        module: nn.Module,
        weight: ParameterPart,
        bias: ParameterPart | None,
        layer: str | None = None,
    ) -> None:
        self.name = name
        self.layer = name if layer is None else layer
        self.module = module
        self.parts: tuple[ParameterPart, ...] = (weight,) if bias is None else (weight, bias)
        self.homogeneous = bias is not None
        self.looked_up = False
        self.shares = False
        self.planned_parts: tuple[ParameterPart, ...] = self.parts
        self._made_with = [(part.parameter.shape, part.parameter.dtype) for part in self.planned_parts]

    @property
    def weight(self) -> Float[Tensor, "..."]:
        """The weight, a view of a parameter."""
        return self.parts[0].of(self.parts[0].parameter)

    @property
    def has_bias(self) -> bool:
        """Whether the bias is part of the block, as the homogeneous coordinate; a frozen bias isn't."""
        return len(self.parts) > 1

    def keep_bias(self, kept: bool) -> None:
        """Keeps the bias in the block, or leaves it out where no product of the weight adds it.

        The shape stays, for what was planned by it: without the bias, the last coordinate of rows and of the gradient
        is 0. It meets none of the others then, so they get what a block of the weight alone would give them (but that
        the damping's share of A is taken over one dimension more).
        """
        self.parts = self.planned_parts if kept else self.planned_parts[:1]

    @property
    def resized(self) -> bool:
        """Whether a parameter has another shape than when the block was made."""
        return [part.parameter.shape for part in self.planned_parts] != [shape for shape, _ in self._made_with]

    @property
    def converted(self) -> str:
        """From which type to which a parameter was converted since the block was made; empty where none was."""
        pairs = [(dtype, part.parameter.dtype) for part, (_, dtype) in zip(self.parts, self._made_with, strict=False)]
        return next((f"from {before} to {now}" for before, now in pairs if before != now), "")

    # Gradients -------------------------------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that the block has a part of: the weight's and, if it is in the block, the bias's."""
        return [part.parameter for part in self.parts]

    @property
    def takes_part(self) -> bool:
        """Whether they have gradients; one that is frozen beside another that isn't counts as zero."""
        lacking = [part.parameter for part in self.parts if part.parameter.grad is None]
        return not lacking or (len(lacking) < len(self.parts) and not any(each.requires_grad for each in lacking))

    @property
    def frozen(self) -> bool:
        """Whether nothing of it is measured for now, since its weight isn't trained."""
        return not self.parts[0].parameter.requires_grad

    def to_matrix(self, tensors: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, "c p q"]:
        """Brings tensors shaped like `parameters()` (gradients, directions) to the block's matrix, bias last."""
        c, p = self.shape.groups, self.shape.d_out
        weight, *bias = [part.of(tensor) for part, tensor in zip(self.parts, tensors, strict=True)]
        if self.homogeneous and not bias:
            bias = [weight.new_zeros(c, p)]
        return torch.cat([self._weight_matrix(weight), *(each.reshape(c, p, 1) for each in bias)], dim=-1)

    def from_matrix(self, matrix: Float[Tensor, "c p q"]) -> list[Float[Tensor, "..."]]:
        """Undoes `to_matrix`: returns tensors shaped like the block's parts of its parameters, views where possible."""
        if not self.homogeneous:
            return [self._weight_of(matrix)]
        bias = self.planned_parts[1]
        found = [self._weight_of(matrix[..., :-1]), matrix[..., -1].reshape(bias.of(bias.parameter).shape)]
        return found[: len(self.parts)]

    def gradient(self, *, copied: bool = True) -> Float[Tensor, "c p q"]:
        """Returns the layer's gradient V as a matrix, bias last, in float32 at least.

        Args:
            copied: Whether it is a fresh tensor in any case; else it may be `.grad` itself, to be read before
                `write_gradient`.

        Raises:
            ValueError: A parameter of the block has no gradient and isn't frozen, or all are.
        """
        gradients = self._gradients()
        if not copied and not self.homogeneous:
            return _aligned(self._weight_matrix(self.parts[0].of(gradients[0])))
        joined = self.to_matrix(gradients)
        return joined.to(torch.promote_types(joined.dtype, torch.float32))

    def gradient_apart(self) -> tuple[Float[Tensor, "c p w"], Float[Tensor, "c p 1"]]:
        """Returns the gradients of the weight and of the bias, which are V's columns, in float32 at least.

        Each may be `.grad` itself, to be read before `write_apart`. Only of a block that has a bias.

        Raises:
            ValueError: A parameter of the block has no gradient.
        """
        weight, bias = (part.of(each) for part, each in zip(self.parts, self._gradients(), strict=True))
        return _aligned(self._weight_matrix(weight)), _aligned(bias.reshape(self.shape.groups, self.shape.d_out, 1))

    def has_gradient_in(self, matrices: Sequence[Float[Tensor, "c p _"]]) -> bool:
        """Says whether what `gradient_apart` returned is `.grad` itself, and no copy."""
        gradients = [part.parameter.grad for part in self.parts]
        pairs = zip(matrices, gradients, self.parts, strict=True)
        return all([each is not None and part.whole and V.data_ptr() == each.data_ptr() for V, each, part in pairs])

    def write_gradient(self, direction: Float[Tensor, "c p q"], scale: Float[Tensor, "..."] | None = None) -> None:
        """Overwrites the layer's gradients in place with `direction`, or `scale` times it.

        Args:
            direction: Bias last.
            scale: A scalar, or one number per matrix, `[c]`; of the direction's dtype.

        Raises:
            ValueError: Another shape, or a parameter without a gradient.
        """
        expected = (self.shape.groups, self.shape.d_out, self.shape.d_in)
        if tuple(direction.shape) != expected:
            raise ValueError(f"block {self.name}: direction has shape {tuple(direction.shape)}, must be {expected}")
        if scale is not None and scale.numel() > 1:
            direction, scale = direction * scale.view(-1, 1, 1), None
        self._write(self.from_matrix(direction), None if scale is None else scale.view(()))

    def write_apart(
        self, weight: Float[Tensor, "c p w"], bias: Float[Tensor, "c p 1"], scale: Float[Tensor, "..."] | None = None
    ) -> None:
        """Overwrites the gradients as `write_gradient` does with a direction whose bias's column lies elsewhere."""
        if scale is not None and scale.numel() > 1:
            weight, bias, scale = weight * scale.view(-1, 1, 1), bias * scale.view(-1, 1, 1), None
        self._write(self.from_apart(weight, bias), None if scale is None else scale.view(()))

    def from_apart(self, weight: Float[Tensor, "c p w"], bias: Float[Tensor, "c p 1"]) -> list[Float[Tensor, "..."]]:
        """Does what `from_matrix` does with a matrix whose last column lies elsewhere."""
        part = self.planned_parts[1]
        return [self._weight_of(weight), bias.reshape(part.of(part.parameter).shape)]

    def written_over(self, *matrices: Float[Tensor, "c p _"]) -> None:
        """Brings to `.grad` what was written over `gradient_apart`'s tensors, or `gradient(copied=False)`'s.

        That is nothing where they are `.grad` itself.
        """
        found = self.from_apart(*matrices) if len(matrices) > 1 else self.from_matrix(*matrices)
        for part, gradient, new in zip(self.parts, self._gradients(), found, strict=True):
            if new.data_ptr() != part.of(gradient).data_ptr():
                part.write(gradient, new)

    def _write(self, directions: Sequence[Tensor], factor: Tensor | None) -> None:
        for part, gradient, new in zip(self.parts, self._gradients(), directions, strict=True):
            part.write(gradient, new, factor)

    def _weight_matrix(self, weight: Tensor) -> Tensor:
        """Returns a tensor shaped like the weight as `[c, p, q]` without the bias."""
        return weight.reshape(self.shape.groups, self.shape.d_out, -1)

    def _weight_of(self, matrix: Tensor) -> Tensor:
        """Undoes `_weight_matrix`."""
        return matrix.reshape(self.weight.shape)

    def _gradients(self) -> list[Tensor]:
        found = [part.parameter.grad for part in self.parts]
        lacking = [place for place, gradient in enumerate(found) if gradient is None]
        if lacking and not self.takes_part:
            raise ValueError(
                f"block {self.name}: its {self.parts[lacking[0]].attribute} has no gradient; call backward() before "
                "the preconditioner's step"
            )
        for place in lacking:
            found[place] = torch.zeros_like(self.parts[place].parameter)  # what is written into it is lost
        # A gradient has a graph only after a backward that makes one.
        return [each.detach() if each.requires_grad else each for each in found if each is not None]


def note_shared(blocks: Iterable[Block]) -> None:
    """Has each block know whether it `shares` numbers of a parameter with another of them."""
    having: dict[nn.Parameter, list[tuple[Block, ParameterPart]]] = {}
    for block in blocks:
        for part in block.planned_parts:  # those that are left out may be kept again
            having.setdefault(part.parameter, []).append((block, part))
    for entries in having.values():
        for (one, part), (other, others) in combinations(entries, 2):
            if one is not other and part.overlaps(others):
                one.shares = other.shares = True


def _aligned(matrix: Tensor) -> Tensor:
    """Returns it, or a copy, in float32 at least, whose place in memory decides on nothing.

    Where it begins decides on the last bits of products, and in a bucket of gradients it begins anywhere.
    """
    if matrix.dtype.itemsize < 4:
        wider = torch.promote_types(matrix.dtype, torch.float32)
        return matrix.to(wider, memory_format=torch.contiguous_format)
    if matrix.is_contiguous() and matrix.data_ptr() % ALIGNMENT == 0:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)
