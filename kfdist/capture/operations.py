"""The operations in which a parameter multiplies an input, read alike whatever function computes them.

`PRODUCTS` is the only table of them. An operation on a parameter that isn't in it, isn't a view and isn't a copy can't
be measured; `kfdist.capture.watch` notes it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kfdist.curvature.blocks import Operation


@dataclass(frozen=True)
class Product:
    """One call of an operation y = W x + b.

    Attributes:
        operation: Which one, with what it was told.
        activation: x.
        weight: W as it was given.
        bias: b; None where there is none.
        transposed: Whether W was given as its transpose, `[q, p]`.
        from_left: Whether x and y have their features second to last, `[..., q, T]` and `[..., p, T]`.
    """

    operation: Operation
    activation: Tensor
    weight: Tensor
    bias: Tensor | None
    transposed: bool = False
    from_left: bool = False


Arguments = Mapping[str, Any]
Reader = Callable[[Arguments, Callable[[Tensor], bool]], "Product | None"]


@dataclass(frozen=True)
class _Form:
    """How to read the arguments of one function: their names in order, and what to make of them."""

    names: Sequence[str]
    read: Reader


def product_of(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Arguments, is_weight: Callable[[Tensor], bool]
) -> "Product | None":
    """Reads a call; None where it isn't the product of a weight and an input."""
    form = PRODUCTS[function]
    given = {**dict(zip(form.names, args, strict=False)), **kwargs}
    if not isinstance(given.get(form.names[0]), Tensor) or not isinstance(given.get(form.names[1]), Tensor):
        return None
    return form.read(given, is_weight)


def _linear(given: Arguments, _is_weight: Callable[[Tensor], bool]) -> Product:
    return Product(Operation("linear"), given["input"], given["weight"], given.get("bias"))


def _addmm(given: Arguments, _is_weight: Callable[[Tensor], bool]) -> Product | None:
    if given.get("alpha", 1) != 1 or given.get("beta", 1) != 1 or not isinstance(given.get("mat2"), Tensor):
        return None
    return Product(Operation("linear"), given["mat1"], given["mat2"], given["input"], transposed=True)


def _matmul(given: Arguments, is_weight: Callable[[Tensor], bool]) -> Product | None:
    left, right = given["input"], given["other"]
    if right.dim() == 2 and is_weight(right):
        return Product(Operation("linear"), left, right, None, transposed=True)
    if left.dim() == 2 and right.dim() > 1 and is_weight(left):
        return Product(Operation("linear"), right, left, None, from_left=True)
    return None


def _convolution(dimensions: int) -> Reader:
    def read(given: Arguments, _is_weight: Callable[[Tensor], bool]) -> Product:
        operation = Operation(
            "convolution",
            stride=_sizes(given.get("stride", 1), dimensions),
            padding=_padding(given.get("padding", 0), dimensions),
            dilation=_sizes(given.get("dilation", 1), dimensions),
            groups=given.get("groups", 1),
        )
        return Product(operation, given["input"], given["weight"], given.get("bias"))

    return read


def _transposed_convolution(dimensions: int) -> Reader:
    def read(given: Arguments, _is_weight: Callable[[Tensor], bool]) -> Product:
        operation = Operation(
            "transposed convolution",
            stride=_sizes(given.get("stride", 1), dimensions),
            padding=_sizes(given.get("padding", 0), dimensions),
            dilation=_sizes(given.get("dilation", 1), dimensions),
            groups=given.get("groups", 1),
        )
        return Product(operation, given["input"], given["weight"], given.get("bias"))

    return read


def _sizes(given: Any, dimensions: int) -> tuple[int, ...]:
    """Brings a number, or one for each dimension, to the latter."""
    sizes = (given,) if isinstance(given, int) else tuple(given)
    return sizes * dimensions if len(sizes) == 1 else sizes


def _padding(given: Any, dimensions: int) -> tuple[int, ...] | str:
    return given if isinstance(given, str) else _sizes(given, dimensions)


_MATMUL = _Form(("input", "other"), _matmul)
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")

PRODUCTS: dict[Callable[..., Any], _Form] = {
    F.linear: _Form(("input", "weight", "bias"), _linear),
    torch.addmm: _Form(("input", "mat1", "mat2"), _addmm),
    Tensor.addmm: _Form(("input", "mat1", "mat2"), _addmm),
    torch.matmul: _MATMUL,
    Tensor.matmul: _MATMUL,
    Tensor.__matmul__: _MATMUL,
    torch.mm: _Form(("input", "other"), _matmul),
    Tensor.mm: _Form(("input", "other"), _matmul),
    F.conv1d: _Form(_CONVOLUTION, _convolution(1)),
    F.conv2d: _Form(_CONVOLUTION, _convolution(2)),
    F.conv3d: _Form(_CONVOLUTION, _convolution(3)),
    F.conv_transpose1d: _Form(_TRANSPOSED, _transposed_convolution(1)),
    F.conv_transpose2d: _Form(_TRANSPOSED, _transposed_convolution(2)),
    F.conv_transpose3d: _Form(_TRANSPOSED, _transposed_convolution(3)),
}
"""By function, as a `TorchFunctionMode` is told it."""

COPIES = frozenset(
    {
        Tensor.to,
        Tensor.float,
        Tensor.half,
        Tensor.bfloat16,
        Tensor.type,
        Tensor.contiguous,
        Tensor.clone,
        torch.clone,
        Tensor.type_as,
        Tensor.double,
        Tensor.cuda,
        Tensor.cpu,
    }
)
"""What makes a copy that a weight may be used by."""

_HOMES = ("torch.nn.functional", "torch.functional")


def is_composite(function: Callable[..., Any]) -> bool:
    """Says whether a function is made, in Python, of operations that can be watched one by one."""
    return hasattr(function, "__code__") and function.__module__ in _HOMES
