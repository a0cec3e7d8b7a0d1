"""The operations in which a parameter multiplies an input, read alike whatever function computes them.

`PRODUCTS` is the only table of them. An operation on a parameter that isn't in it, isn't a view and isn't a copy can't
be measured; `kfdist.capture.seen_uses` notes it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kfdist.curvature.blocks import Operation
from kfdist.curvature.blocks.embedding import BAGS, LOOKUP, NOWHERE
from kfdist.torch_internals import grouped_mm


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
        ends: Where W is a stack of matrices and x has rows `[S, q]` for one after another: where each one's rows end.
    """

    operation: Operation
    activation: Tensor
    weight: Tensor
    bias: Tensor | None
    transposed: bool = False
    from_left: bool = False
    ends: Tensor | None = None

    @property
    def features(self) -> int:
        """Which dimension of y has its features, counted from the end."""
        return -1 - max(int(self.from_left), len(self.operation.stride))


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


def _lookup(given: Arguments, _is_weight: Callable[[Tensor], bool]) -> Product | None:
    if given.get("scale_grad_by_freq"):
        return None
    return looked_up(given["weight"], _without(given["indices"], given.get("padding_idx")))


def looked_up(table: Tensor, numbers: Tensor) -> Product:
    """Returns the product that rows of a table, picked by their numbers, are: of one-hot inputs and its transpose."""
    return Product(LOOKUP, numbers if numbers.dim() else numbers.reshape(1), table, None, transposed=True)


def _bag(given: Arguments, _is_weight: Callable[[Tensor], bool]) -> Product | None:
    mode, numbers, table = given.get("mode", "mean"), given["input"], given["weight"]
    weighted = given.get("scale_grad_by_freq") or given.get("per_sample_weights") is not None
    if mode not in BAGS or weighted or numbers.is_nested:
        return None
    padding = given.get("padding_idx")
    numbers = _without(numbers, None if padding is None else padding % len(table))
    if numbers.dim() == 1:
        numbers = _side_by_side(numbers, given["offsets"], ends=bool(given.get("include_last_offset")))
    return Product(BAGS[mode], numbers, table, None, transposed=True)


def _side_by_side(numbers: Tensor, offsets: Tensor, *, ends: bool) -> Tensor:
    """Lays bags that come one after another out as `[N, L]`, filled up with `NOWHERE`; waits for the device.

    Args:
        numbers: Of all bags.
        offsets: Where each begins.
        ends: Whether the last offset is the end of the last bag, and no beginning.
    """
    offsets = offsets if ends else torch.cat([offsets, offsets.new_full((1,), len(numbers))])
    starts, sizes = offsets[:-1].unsqueeze(1), offsets.diff().unsqueeze(1)
    place = torch.arange(int(sizes.max()) if len(sizes) else 0, device=numbers.device)
    padded = torch.cat([numbers, numbers.new_full((1,), NOWHERE)])
    return padded[torch.where(place < sizes, starts + place, len(numbers))]


def _without(numbers: Tensor, padding: int | None) -> Tensor:
    """Returns numbers with `NOWHERE` for those of padding, which has no gradient."""
    if padding is None or padding < 0:
        return numbers
    return numbers.masked_fill(numbers == padding, NOWHERE)


def _linear(given: Arguments, _is_weight: Callable[[Tensor], bool]) -> Product:
    return Product(Operation("linear"), given["input"], given["weight"], given.get("bias"))


def _addmm(given: Arguments, _is_weight: Callable[[Tensor], bool]) -> Product | None:
    if given.get("alpha", 1) != 1 or given.get("beta", 1) != 1 or not isinstance(given.get("mat2"), Tensor):
        return None
    return Product(Operation("linear"), given["mat1"], given["mat2"], given["input"], transposed=True)


def _matmul(given: Arguments, is_weight: Callable[[Tensor], bool]) -> Product | None:
    left, right = given["input"], given["other"] if "other" in given else given["mat2"]
    for weight, other in ((right, left), (left, right)):
        stacked = weight.dim() == 3 and other.dim() > 1
        if not is_weight(weight) or not (stacked or (weight.dim() == 2 and other.dim() > (weight is left))):
            continue
        if stacked and (other.dim() == 2 or other.shape[-3] == 1):  # each matrix meets all of it
            other = other.expand(*other.shape[:-3], len(weight), -1, -1)
        if weight is right:
            return Product(Operation("linear"), other, weight, None, transposed=True)
        return Product(Operation("linear"), other, weight, None, from_left=True)
    return None


def _baddbmm(given: Arguments, is_weight: Callable[[Tensor], bool]) -> Product | None:
    if given.get("alpha", 1) != 1 or not isinstance(given.get("batch2"), Tensor):
        return None
    return _matmul({"input": given["batch1"], "other": given["batch2"]}, is_weight)


def _grouped(given: Arguments, _is_weight: Callable[[Tensor], bool]) -> Product | None:
    x, weight, ends = given["mat_a"], given["mat_b"], given.get("offs")
    if x.dim() != 2 or weight.dim() != 3 or ends is None or given.get("bias") is not None:
        return None
    return Product(Operation("linear"), x, weight, None, transposed=True, ends=ends)


def _convolution(kind: str, names: Sequence[str], dimensions: int) -> _Form:
    def sizes(given: Any) -> tuple[int, ...]:
        each = (given,) if isinstance(given, int) else tuple(given)
        return each * dimensions if len(each) == 1 else each

    def read(given: Arguments, _is_weight: Callable[[Tensor], bool]) -> Product:
        padding = given.get("padding", 0)
        operation = Operation(
            kind,
            stride=sizes(given.get("stride", 1)),
            padding=padding if isinstance(padding, str) else sizes(padding),
            dilation=sizes(given.get("dilation", 1)),
            groups=given.get("groups", 1),
        )
        return Product(operation, given["input"], given["weight"], given.get("bias"))

    return _Form(names, read)


_MATMUL = _Form(("input", "other"), _matmul)
_BAG = ("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse",
        "per_sample_weights", "include_last_offset", "padding_idx")  # fmt: skip
_PLAIN = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")

PRODUCTS: dict[Callable[..., Any], _Form] = {
    F.linear: _Form(("input", "weight", "bias"), _linear),
    torch.addmm: _Form(("input", "mat1", "mat2"), _addmm),
    Tensor.addmm: _Form(("input", "mat1", "mat2"), _addmm),
    torch.matmul: _MATMUL,
    Tensor.matmul: _MATMUL,
    Tensor.__matmul__: _MATMUL,
    torch.mm: _Form(("input", "mat2"), _matmul),
    Tensor.mm: _Form(("input", "mat2"), _matmul),
    torch.bmm: _Form(("input", "mat2"), _matmul),
    Tensor.bmm: _Form(("input", "mat2"), _matmul),
    torch.baddbmm: _Form(("input", "batch1", "batch2"), _baddbmm),
    Tensor.baddbmm: _Form(("input", "batch1", "batch2"), _baddbmm),
    torch.embedding: _Form(("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse"), _lookup),
    F.embedding_bag: _Form(_BAG, _bag),
    grouped_mm: _Form(("mat_a", "mat_b"), _grouped),
    F.conv1d: _convolution("convolution", _PLAIN, 1),
    F.conv2d: _convolution("convolution", _PLAIN, 2),
    F.conv3d: _convolution("convolution", _PLAIN, 3),
    F.conv_transpose1d: _convolution("transposed convolution", _TRANSPOSED, 1),
    F.conv_transpose2d: _convolution("transposed convolution", _TRANSPOSED, 2),
    F.conv_transpose3d: _convolution("transposed convolution", _TRANSPOSED, 3),
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


def picked_entries(function: Callable[..., Any], args: Sequence[Any], kwargs: Arguments) -> Tensor | None:
    """Returns the indices by which a call copies entries along dim 0 of its first argument; None for other calls."""
    if function in (torch.index_select, Tensor.index_select):
        given = {**dict(zip(("input", "dim", "index"), args, strict=False)), **kwargs}
        index = given["index"] if given.get("dim") == 0 else None
    else:
        index = args[1] if function is Tensor.__getitem__ else None
    known = isinstance(index, Tensor) and index.dim() == 1 and index.dtype in (torch.int64, torch.int32)
    return index if known else None


def picked_rows(function: Callable[..., Any], args: Sequence[Any], kwargs: Arguments) -> Tensor | None:
    """Returns the numbers, of any shape, of the rows that a call looks up in its first argument by indexing it."""
    if function is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype in (torch.int64, torch.int32):
        return args[1]
    return picked_entries(function, args, kwargs)


LOOKUPS = frozenset({torch.embedding, F.embedding_bag})
"""What picks rows of a weight."""

SUMS = frozenset({torch.add, Tensor.add, Tensor.add_})
"""What adds a bias apart from the product, or positions to what they are positions of."""


def addends(args: Sequence[Any], kwargs: Arguments) -> tuple[Tensor, Tensor] | None:
    """Returns the two tensors that one of `SUMS` adds; None where it does something else."""
    given = {**dict(zip(("input", "other", "alpha"), args, strict=False)), **kwargs}
    left, right = given.get("input"), given.get("other")
    if given.get("alpha", 1) != 1 or not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return None
    return left, right


_HOMES = ("torch.nn.functional", "torch.functional")


def is_composite(function: Callable[..., Any]) -> bool:
    """Says whether a function is made, in Python, of operations that can be watched one by one."""
    return hasattr(function, "__code__") and function.__module__ in _HOMES
