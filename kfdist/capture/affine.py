"""The operations in which parameters scale or shift single units, read alike: y = scale x_hat + shift.

`AFFINE` is the only table of them; the bias of a product (`kfdist.capture.operations`) is a shift too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kfdist.capture.operations import Product
from kfdist.curvature.blocks.rows import accumulation_dtype
from kfdist.torch_internals import base_of, batch_statistics

_EXPANDED = -1
"""Stride of a dimension that shows one entry several times, as `kfdist.capture.registry` writes it."""


Normalised = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class Affine:
    """One use of a scale, of a shift, or of both.

    Attributes:
        scale: As it was given; None where there is none.
        shift: Likewise.
        operand: What is normalised or multiplied; None for a shift alone.
        normalised: Makes x_hat of the operand, or of the chosen entries of its dim 0; None where the operand is x_hat.
        place: The output's dimension where the first one of scale and shift lies; None: their last one is its last.
        piece: Dimension, start and length of the output's part that is meant; None for all of it.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    operand: Tensor | None = None
    normalised: Normalised | None = None
    place: int | None = None
    piece: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Layout:
    """How the units of a block lie in an output.

    Attributes:
        dims: The output's dimensions that tell units apart, in the order of the units.
        positions: Which of the block's units they are, `[U]`; None for all of them in their order.
        count: How many units the block has.
    """

    dims: tuple[int, ...]
    positions: Tensor | None
    count: int


@dataclass(frozen=True)
class Columns:
    """Makes gradients of a block of units from gradients of the output.

    Attributes:
        block: The block.
        roles: "scale" or "shift", of each of the block's parts.
        layout: Of the units.
        normalised: As in `Affine`.
        piece: As in `Affine`.
        alone: Whether the output is made of parameters alone, and is the same for all examples.
    """

    block: str
    roles: tuple[str, ...]
    layout: Layout
    normalised: Normalised | None
    piece: tuple[int, int, int] | None
    alone: bool = False

    @property
    def needs_operand(self) -> bool:
        """Whether the operand is looked at."""
        return "scale" in self.roles

    def by_entries(self, gradient: Tensor, *, turned: bool = False) -> Tensor:
        """Returns the output's gradient, or the part that is meant, with the entries of examples along dim 0.

        Args:
            gradient: Of the output.
            turned: Whether the examples lie along dim 1, if no units do.
        """
        if self._turns(turned):
            gradient = gradient.transpose(0, 1)
        return gradient if self.piece is None else gradient.narrow(*self.piece)

    def gradients(
        self, gradient: Tensor, operand: Tensor, *, turned: bool = False, chosen: Tensor | None = None
    ) -> Tensor:
        """Returns the gradients `[n, c, k]` of each entry of dim 0.

        Args:
            gradient: From `by_entries`.
            operand: As in `Affine`; not looked at where no part is a scale.
            turned: As for `by_entries`.
            chosen: Entries to take, `[n]` on the same device; None for all.
        """
        dtype, entries = accumulation_dtype(gradient), len(gradient)
        if self.needs_operand and self._turns(turned):
            operand = operand.expand_as(gradient.transpose(0, 1)).transpose(0, 1)
        own = operand.dim() == gradient.dim() and len(operand) == entries
        gradient = gradient if chosen is None else gradient.index_select(0, chosen)
        columns = []
        for role in self.roles:
            if role == "shift":
                columns.append(self._over_units(gradient, dtype))
            elif self.normalised is not None:
                columns.append(self._over_units(gradient.to(dtype) * self.normalised(operand, chosen).to(dtype), dtype))
            else:
                x_hat = operand.index_select(0, chosen) if own and chosen is not None else operand
                columns.append(self._over_units(gradient.to(dtype) * x_hat.to(dtype), dtype))
        found, layout = torch.stack(columns, dim=-1), self.layout
        if layout.positions is None:
            return found
        whole = found.new_zeros(len(found), layout.count, len(columns))
        return whole.index_copy_(1, layout.positions, found)

    def _turns(self, turned: bool) -> bool:
        return turned and 1 not in self.layout.dims and self.piece is None

    def _over_units(self, terms: Tensor, dtype: torch.dtype) -> Tensor:
        """Sums the positions of each unit: `[n, ...]` to `[n, U]`."""
        others = [dim for dim in range(1, terms.dim()) if dim not in self.layout.dims]
        summed = terms.sum(others, dtype=dtype) if others else terms.to(dtype)
        return summed.reshape(len(terms), summed.shape[1:].numel())  # also where there are no examples


Arguments = Mapping[str, Any]
Reader = Callable[[Arguments, Tensor], Sequence[Affine]]


@dataclass(frozen=True)
class _Form:
    """How to read the arguments of one function: their names in order, and what to make of them and its output."""

    names: Sequence[str]
    read: Reader


def affine_uses(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Arguments, output: Tensor, product: Product | None
) -> Sequence[Affine]:
    """Reads a call; returns what of it could be the use of a scale or shift.

    Args:
        function: As a `TorchFunctionMode` is told it.
        args: By position.
        kwargs: By name.
        output: What it returned.
        product: What `kfdist.capture.operations` makes of the same call.
    """
    if product is not None:
        bias, linear = product.bias, product.operation.kind == "linear"
        return [] if bias is None else [Affine(shift=bias, place=output.dim() - bias.dim() if linear else 1)]
    form = AFFINE.get(function)
    if form is None:
        return []
    return form.read({**dict(zip(form.names, args, strict=False)), **kwargs}, output)


def lay_out(
    use: Affine, parameter: Tensor, stride: Sequence[int], offset: int, *, whole: Tensor, output: Tensor
) -> Layout | None:
    """Finds where the units lie in an output; None where they aren't told apart by dimensions of their own.

    Args:
        use: The use.
        parameter: Its scale or shift, as it was given: a part or a copy of a parameter.
        stride: Of that, in the parameter, `_EXPANDED` where one entry is shown several times.
        offset: Likewise.
        whole: The parameter.
        output: The operation's.
    """
    shape = list(output.shape)
    if use.piece is not None:
        shape[use.piece[0]] = use.piece[2]
    place = len(shape) - parameter.dim() if use.place is None else use.place
    if place < 0 or not shape or any(step < _EXPANDED for step in stride):
        return None  # also for entries that were picked by their numbers
    dims: list[int] = []
    sizes: list[int] = []
    steps: list[int] = []
    for dim, (size, step) in enumerate(zip(parameter.shape, stride, strict=True), start=place):
        if dim >= len(shape) or (size not in (1, shape[dim])):
            return None
        if size == 1 or step == _EXPANDED:
            continue
        if dim == 0:
            return None  # no dimension is left for the examples
        dims.append(dim)
        sizes.append(size)
        steps.append(step)
    in_order = [torch.Size(sizes[i + 1 :]).numel() for i in range(len(sizes))]
    if torch.Size(sizes).numel() == whole.numel() and steps == in_order and not offset:
        return Layout(tuple(dims), None, whole.numel())
    if not whole.is_contiguous():
        return None
    numbers = torch.arange(whole.numel(), device=whole.device)
    return Layout(tuple(dims), numbers.as_strided(sizes, steps, offset).reshape(-1), whole.numel())


@dataclass(frozen=True, kw_only=True, eq=False)
class _OverTheBatch:
    """Makes x_hat of an operand where its channels are normalised over dim 0 and positions, or by running statistics.

    It holds neither the operand nor itself: a hook of the graph has it, and would keep the graph, activations included,
    until a garbage collection, which finds one layer of a chain at a time.

    Attributes:
        function: `torch.batch_norm`, or `torch.instance_norm`, whose entries of dim 0 don't depend on each other.
        running: Mean and variance that it is normalised by; None where the batch's own are used.
        kept: The mean and inverse deviation of each channel, `[C]`, of the whole batch; None where they aren't known.
        eps: Added to variances.
        cudnn_enabled: As the function takes it.
    """

    function: Callable[..., Tensor]
    running: tuple[Tensor, Tensor] | None
    kept: tuple[Tensor, Tensor] | None
    eps: float
    cudnn_enabled: bool

    def __call__(self, x: Tensor, chosen: Tensor | None) -> Tensor:
        own = self.running is None
        if chosen is not None and self.kept is None and own and self.function is torch.batch_norm:
            return self(x, None).index_select(0, chosen)  # an entry's x_hat depends on all the others
        wide = (x if chosen is None else x.index_select(0, chosen)).to(accumulation_dtype(x))
        if chosen is not None and self.kept is not None:
            mean, scale = (each.to(wide.dtype).reshape(1, -1, *(1,) * (x.dim() - 2)) for each in self.kept)
            return (wide - mean) * scale
        # Without running statistics where the batch's own are used: they would be updated once more.
        mean, var = (None, None) if self.running is None else (each.to(wide.dtype) for each in self.running)
        return self.function(wide, None, None, mean, var, own, 0.0, self.eps, self.cudnn_enabled)


def _batch_norm(given: Arguments, output: Tensor) -> Sequence[Affine]:
    function = torch.batch_norm if "training" in given else torch.instance_norm
    training = given["training"] if "training" in given else given["use_input_stats"]
    normalised = _OverTheBatch(
        function=function,
        running=None if training else (given["running_mean"], given["running_var"]),
        # The mean and inverse deviation that its backward needs: all of the batch is behind them.
        kept=batch_statistics(output) if function is torch.batch_norm and training else None,
        eps=given["eps"],
        cudnn_enabled=given["cudnn_enabled"],
    )
    scale, shift = given["weight"], given["bias"]
    return [Affine(scale=scale, shift=shift, operand=given["input"], normalised=normalised, place=1)]


def _one_by_one(function: Callable[[Tensor], Tensor]) -> Normalised:
    """Normalises each entry of dim 0 by itself."""

    def normalised(x: Tensor, chosen: Tensor | None) -> Tensor:
        some = x if chosen is None else x.index_select(0, chosen)
        return function(some.to(accumulation_dtype(x)))

    return normalised


def _layer_norm(given: Arguments, _output: Tensor) -> Sequence[Affine]:
    shape, eps = given["normalized_shape"], given.get("eps", 1e-5)
    normalised = _one_by_one(partial(torch.layer_norm, normalized_shape=shape, weight=None, bias=None, eps=eps))
    scale, shift = given.get("weight"), given.get("bias")
    return [Affine(scale=scale, shift=shift, operand=given["input"], normalised=normalised)]


def _rms_norm(given: Arguments, _output: Tensor) -> Sequence[Affine]:
    shape, eps = given["normalized_shape"], given.get("eps")
    normalised = _one_by_one(partial(torch.rms_norm, normalized_shape=shape, weight=None, eps=eps))
    return [Affine(scale=given.get("weight"), operand=given["input"], normalised=normalised)]


def _group_norm(given: Arguments, _output: Tensor) -> Sequence[Affine]:
    groups, eps = given["num_groups"], given.get("eps", 1e-5)
    normalised = _one_by_one(partial(torch.group_norm, num_groups=groups, weight=None, bias=None, eps=eps))
    scale, shift = given.get("weight"), given.get("bias")
    return [Affine(scale=scale, shift=shift, operand=given["input"], normalised=normalised, place=1)]


def _prelu(given: Arguments, _output: Tensor) -> Sequence[Affine]:
    return [
        Affine(
            scale=given["weight"], operand=given["input"], normalised=_one_by_one(partial(torch.clamp, max=0)), place=1
        )
    ]


def _scaled(given: Arguments, _output: Tensor) -> Sequence[Affine]:
    one, other = given["input"], given["other"]
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return []
    return [Affine(scale=one, operand=other), Affine(scale=other, operand=one)]


def _added_product(given: Arguments, _output: Tensor) -> Sequence[Affine]:
    if given.get("value", 1) != 1:
        return []
    one, other = given["tensor1"], given["tensor2"]
    return [Affine(scale=one, operand=other), Affine(scale=other, operand=one), Affine(shift=given["input"])]


def _shifted(given: Arguments, output: Tensor) -> Sequence[Affine]:
    """Reads x + p and x - p: the sign of a gradient is no matter for its square."""
    if given.get("alpha", 1) != 1 or base_of(output) is not None:
        return []
    return [Affine(shift=each) for each in (given["input"], given["other"]) if isinstance(each, Tensor)]


def _joined(given: Arguments, output: Tensor) -> Sequence[Affine]:
    """Reads cat: each tensor shifts, so to speak, a part of the output that is 0 without it."""
    dim, start, found = given.get("dim", 0) % max(output.dim(), 1), 0, []
    for each in given["tensors"]:
        if each.dim() == output.dim():
            found.append(Affine(shift=each, piece=(dim, start, each.shape[dim])))
            start += each.shape[dim]
    return found


def _repeated(given: Arguments, _output: Tensor) -> Sequence[Affine]:
    return [Affine(shift=given["input"])]


_OPERANDS = _Form(("input", "other"), _scaled)
_TERMS = _Form(("input", "other"), _shifted)
_LIST = _Form(("tensors", "dim"), _joined)
_STATISTICS = ("weight", "bias", "running_mean", "running_var")

AFFINE: dict[Callable[..., Any], _Form] = {
    torch.batch_norm: _Form(("input", *_STATISTICS, "training", "momentum", "eps", "cudnn_enabled"), _batch_norm),
    torch.instance_norm: _Form(
        ("input", *_STATISTICS, "use_input_stats", "momentum", "eps", "cudnn_enabled"), _batch_norm
    ),
    torch.layer_norm: _Form(("input", "normalized_shape", "weight", "bias", "eps"), _layer_norm),
    torch.group_norm: _Form(("input", "num_groups", "weight", "bias", "eps"), _group_norm),
    torch.rms_norm: _Form(("input", "normalized_shape", "weight", "eps"), _rms_norm),
    torch.prelu: _Form(("input", "weight"), _prelu),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply), _OPERANDS),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__), _TERMS),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.__sub__, Tensor.sub_, Tensor.__isub__), _TERMS),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _LIST),
    **dict.fromkeys((torch.addcmul, Tensor.addcmul), _Form(("input", "tensor1", "tensor2"), _added_product)),
    Tensor.repeat: _Form(("input",), _repeated),
}
"""By function, as a `TorchFunctionMode` is told it."""

MOVES = frozenset({torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__})
"""What, of a parameter and a number, makes a tensor that has the parameter's gradient."""

REFLECTIONS = frozenset({Tensor.__rsub__, torch.rsub})
"""What makes one that has its negative, which is no matter for the squares of a bare parameter's gradients."""
