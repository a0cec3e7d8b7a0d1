"""Sees every operation on tensors as torch calls it from Python, composite ones as what they are made of."""

import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from kfdist.capture.einsum import as_product
from kfdist.capture.lookups import LookupLog
from kfdist.capture.made_of_parameters import MadeOfParameters
from kfdist.capture.operations import PRODUCTS, is_composite
from kfdist.capture.passes import tensors_in
from kfdist.capture.recurrent import written_out
from kfdist.capture.registry import Registry
from kfdist.capture.saved_inputs import SaveLog
from kfdist.torch_internals import oddity


class SeesOperations(Protocol):
    """What wants to know of operations."""

    @property
    def registry(self) -> Registry:
        """The parameters that are looked for."""
        ...

    @property
    def lookups(self) -> LookupLog:
        """Rows that were looked up."""
        ...

    @property
    def saved(self) -> SaveLog:
        """What the last operation has saved."""
        ...

    @property
    def made(self) -> MadeOfParameters:
        """What was made of parameters alone."""
        ...

    def saw(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor, odd: str
    ) -> None:
        """An operation had a block's parameter among its arguments, and made a tensor that is no view of it.

        Args:
            function: The operation.
            args: Its arguments.
            kwargs: Its arguments by name.
            output: That tensor.
            odd: Why it can't be measured; empty where nothing is in the way.
        """

    def saw_rows(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        """An operation had looked-up rows among its arguments, and no block's parameter, and made another tensor."""


class OperationMode(TorchFunctionMode):
    """Shows a watch every operation on tensors, as torch calls it from Python."""

    def __init__(self, watch: SeesOperations) -> None:
        super().__init__()
        self._watch = weakref.ref(watch)  # left on the stack by an interrupted forward, it keeps nothing alive

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, watch = kwargs or {}, self._watch()
        if watch is None:
            return func(*args, **kwargs)
        registry = watch.registry
        given = tensors_in((args, kwargs))
        if not any(map(registry.knows, given)):
            rows = any(watch.lookups.of(each) is not None for each in given)
            output = func(*args, **kwargs)
            watch.made.note(func, given, output)
            for each in tensors_in((output,)) if rows else ():
                if each.requires_grad and watch.lookups.of(each) is None:
                    watch.saw_rows(func, args, kwargs, each)
                    break
            return output
        kernel = written_out(func, args) if torch.is_grad_enabled() else None
        if kernel is not None:
            with self:
                return kernel(*args, **kwargs)
        if func not in PRODUCTS and is_composite(func):
            product = as_product(args, kwargs, registry.knows) if func is torch.einsum else None
            with self:
                return _open(func)(*args, **kwargs) if product is None else product()
        if func in PRODUCTS and not any(map(oddity, given)):
            output = watch.saved.call(func, args, kwargs)
        else:
            watch.saved.forget()
            output = func(*args, **kwargs)
        watch.made.note(func, given, output)
        # `x[mask] = parameter` returns nothing and changes x.
        for each in tensors_in((args[:1] if func is Tensor.__setitem__ else output,)):
            odd = oddity(each)
            if (each.requires_grad or odd) and not registry.knows(each):
                watch.saw(func, args, kwargs, each, odd)
                break
        return output


_OPENED: dict[Callable[..., Any], Callable[..., Any]] = {}


def _open(function: Any) -> Callable[..., Any]:
    """Returns a function that does what a composite one does without offering itself to the mode once more.

    A composite of `torch.nn.functional` first asks whether anybody overrides it, and then calls the mode again; here
    the answer is no, and the mode sees the operations that it is made of.
    """
    opened = _OPENED.get(function)
    if opened is None:
        names = {name: _nobody for name in function.__globals__ if name.startswith("has_torch_function")}
        opened = types.FunctionType(
            function.__code__,
            {**function.__globals__, **names},
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        opened.__kwdefaults__ = function.__kwdefaults__
        _OPENED[function] = opened
    return opened


def _nobody(*_arguments: Any) -> bool:
    return False
