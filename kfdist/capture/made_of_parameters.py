"""Which tensors of a forward are made of the model's parameters alone, and so are the same for all examples.

The gradient of a product of two of them is a sum over examples: however many rows it has, none of them is an example's.
So it is with B A of a merged low-rank pair, W + B A, and with R W of a weight that is turned.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from kfdist.capture.operations import LOOKUPS, PRODUCTS
from kfdist.capture.passes import tensors_in
from kfdist.torch_internals import base_of, changes_in_place

_SPREADING = frozenset(
    {
        Tensor.repeat,
        Tensor.repeat_interleave,
        torch.repeat_interleave,
        Tensor.tile,
        torch.tile,
        torch.cat,
        torch.concat,
        torch.concatenate,
        torch.stack,
        torch.hstack,
        torch.vstack,
        torch.dstack,
    }
)
"""What may have entries once for each example, and then a gradient for each. `expand` shows itself by its strides."""

_MULTIPLYING = (PRODUCTS.keys() - LOOKUPS) | {torch.einsum, torch.tensordot, torch.bilinear, F.bilinear}

_ADDING = frozenset({torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm})
"""Those of them that add their first tensor to the product of the others."""


@dataclass(frozen=True)
class _Origin:
    """What a tensor is made of, where no input of the forward is in it.

    Attributes:
        parameters: The parameters, by id; none of a buffer.
        alone: Whether nothing else is in it; a buffer's rows may be the examples.
    """

    parameters: Set[int]
    alone: bool


@dataclass(frozen=True)
class _Made:
    """A tensor as it was made."""

    tensor: weakref.ref[Tensor]
    version: int | None
    origin: _Origin


Origins = Mapping[int, tuple[weakref.ref[Tensor], _Origin]]
"""Of tensors by id, none of which it keeps alive."""


def origins_in(model: nn.Module) -> Origins:
    """Returns those of a model's parameters and buffers, but for lazy ones, which have no values yet."""
    buffer = _Origin(frozenset(), alone=False)
    known: dict[int, tuple[weakref.ref[Tensor], _Origin]] = {}
    for each in model.buffers():
        known[id(each)] = weakref.ref(each), buffer
    for each in model.parameters():
        known[id(each)] = weakref.ref(each), _Origin(frozenset({id(each)}), alone=True)
    lazy = UninitializedParameter, UninitializedBuffer
    return {key: each for key, each in known.items() if not isinstance(each[0](), lazy)}


class MadeOfParameters:
    """What the forward of one thread has made of parameters and buffers, and what of it of parameters alone.

    Tensors without a gradient aren't among it: `zeros_like` of a parameter is a constant, whose rows may be examples.

    Args:
        given: From `origins_in` of the model.
        multiplied: Takes the ids of the parameters that go into a product with an input, by themselves or by what was
            made of them.
    """

    def __init__(self, given: Origins, multiplied: set[int]) -> None:
        self._known = given
        self._multiplied = multiplied
        self._made: dict[int, _Made] = {}
        self._given = False

    def begin(self, inputs: Any) -> None:
        """A module is called from outside of the model; of a parameter that it is given, rows may be the examples."""
        first = next((each for each in tensors_in(inputs) if each.dim()), None)
        self._given = first is not None and self._origin(first) is not None

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is made of parameters alone, repeats none of its entries, and has no examples."""
        origin = None if self._given else self._origin(tensor)
        return origin is not None and origin.alone

    def note(self, function: Callable[..., Any], given: Sequence[Tensor], output: Any) -> None:
        """Takes an operation.

        Args:
            function: As a `TorchFunctionMode` is told it.
            given: The tensors among its arguments.
            output: What it returned.
        """
        if function in _MULTIPLYING:
            factors = [self._origin(each) for each in given[int(function in _ADDING) :]]
            if not all(factors):
                self._multiplied.update(*(each.parameters for each in factors if each))
                return
        parameters, alone = set[int](), True
        for each in given:
            origin = self._origin(each)
            if origin is None:
                return  # as of most operations, whose first tensor tells
            parameters |= origin.parameters
            alone = alone and origin.alone
        if not parameters or function in _SPREADING:
            return
        origin = _Origin(frozenset(parameters), alone)
        for each in tensors_in((output,)):
            if each.requires_grad:
                self._made[id(each)] = _Made(weakref.ref(each), changes_in_place(each), origin)

    def forget(self) -> None:
        """Forgets what was made."""
        self._made.clear()

    def _origin(self, tensor: Tensor) -> _Origin | None:
        """Returns what a tensor is made of; None where an input or a constant is in it, or it repeats entries."""
        for whole in (tensor, base_of(tensor)):
            if whole is None:
                continue
            known, made = self._known.get(id(whole)), self._made.get(id(whole))
            if known is not None and known[0]() is whole:
                origin = known[1]
            elif made is not None and made.tensor() is whole and made.version == changes_in_place(whole):
                origin = made.origin
            else:
                continue
            return None if _repeats(tensor) else origin
        return None


def _repeats(tensor: Tensor) -> bool:
    """Whether a tensor shows some of its entries several times, as an expanded one does."""
    steps = tensor.stride() if tensor.layout is torch.strided else ()
    return any(size > 1 and step == 0 for size, step in zip(tensor.shape, steps, strict=False))
