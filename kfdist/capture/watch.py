"""Watches the operations of a model while its modules' forwards run, and reports those that use a block's parameters.

What a layer's weight is multiplied with is seen at the operation itself, not at the call of the module that holds it:
the two differ where a forward uses another module's weight, where a module's forward or output is replaced, and where
activations change the output in place. Hooks are global ones of `nn.Module`, installed while something is due and then
removed, so that nothing is ever left on the model: it can be copied, pickled and compiled as if nobody watched.
"""

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from kfdist.capture.affine import MOVES, Affine, Columns, affine_uses
from kfdist.capture.lookups import Lookup, LookupLog, is_shared
from kfdist.capture.operation_mode import OperationMode
from kfdist.capture.operations import (
    COPIES,
    LOOKUPS,
    PRODUCTS,
    SUMS,
    Product,
    addends,
    looked_up,
    picked_entries,
    picked_rows,
    product_of,
)
from kfdist.capture.passes import tensors_in
from kfdist.capture.registry import Part, Registry
from kfdist.curvature.blocks import Block, LayerBlock
from kfdist.curvature.blocks.embedding import LOOKUP
from kfdist.torch_internals import EagerSteps, changes_in_place, eager_steps, leave_function_mode


class Observed(Protocol):
    """What wants to know of a model's forward."""

    def begin_calls(self) -> None:
        """A module of the model is called from outside of the model."""

    def begin_forward(self) -> None:
        """The model is called as a whole."""

    def end_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """That call has ended; `inputs` are its arguments, `output` is None where it failed."""

    def product(self, parts: Sequence[Part], product: Product, output: Tensor, *, training: bool) -> None:
        """Weights of blocks were used, in a module that is in training mode or not."""

    def affine(self, columns: Sequence[Columns], use: Affine, output: Tensor, *, training: bool) -> None:
        """Scales or shifts of blocks were used, in such a module."""


@dataclass(frozen=True)
class _Waiting:
    """A product that the bias may yet be added to.

    Attributes:
        output: What it gave.
        version: The output's, to notice changes.
        parts: The blocks that have a bias.
        features: The dimension of the features, from the end.
    """

    output: weakref.ref[Tensor]
    version: int | None
    parts: Sequence[Part]
    features: int


class _Thread(threading.local):
    """Where a thread is among the model's modules, since which of them it is watched, and what it waits for."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.mode: OperationMode | None = None
        self.mode_depth = 0
        self.waiting: dict[int, _Waiting] = {}
        self.lookups = LookupLog()
        self.start = 0

    def forget(self) -> None:
        """Forgets this thread's calls under way, and takes its mode off its stack; other threads go on in theirs."""
        if self.mode is not None:
            leave_function_mode(self.mode)
        self.modules, self.mode, self.waiting, self.lookups = [], None, {}, LookupLog()


class Watch:
    """Watches one model.

    The first time a block is due every module is watched; from then on those in whose own forward it was used.

    Args:
        model: The bare model.
        blocks: What is looked for.
        observed: Is told.

    Attributes:
        registry: The blocks' parameters.
        unhandled: Functions that used a block's weight (or its bias, where the second is true) and can't be measured.
        biased: Whether the bias is added, of each block with one whose weight was used.
    """

    def __init__(self, model: nn.Module, blocks: Collection[Block], observed: Observed) -> None:
        self._model = model
        self._ids = {id(module) for module in model.modules()}
        self._observed: Observed = weakref.proxy(observed)
        self.registry = Registry(blocks)
        self.unhandled: dict[tuple[str, bool], set[str]] = defaultdict(set)
        self.biased: dict[str, bool] = {}
        self._places: dict[str, set[int]] = {}
        self._entries: Set[int] = frozenset()
        self._with_bias = {block.name for block in blocks if block.has_bias and isinstance(block, LayerBlock)}
        self._thread = _Thread()
        self._start = 0
        self._installed: weakref.finalize[..., Watch] | None = None

    @property
    def looked(self) -> bool:
        """Whether any use was seen; before, every module is watched."""
        return bool(self._places)

    @property
    def lookups(self) -> LookupLog:
        """What was looked up in this thread's forward."""
        return self._thread.lookups

    def start(self, names: Collection[str]) -> None:
        """Watches for the blocks `names` until `stop`, or until it is told others."""
        known = all(name in self._places for name in names)
        self._entries = set().union(*(self._places[name] for name in names)) if known else self._ids
        if self._installed is None:
            # The hooks hold no more than a weak reference: with a forgotten watch they go.
            enter, leave = weakref.WeakMethod(self._enter), weakref.WeakMethod(self._leave)
            handles = [
                register_module_forward_pre_hook(lambda *call: _call(enter, call)),
                register_module_forward_hook(lambda *call: _call(leave, call), with_kwargs=True, always_call=True),
            ]
            self._installed = weakref.finalize(self, _remove, handles, eager_steps(), self._thread)
            self._start += 1

    def stop(self) -> None:
        """Removes the hooks, and what an interrupted forward left behind in this thread."""
        if self._installed is not None:
            self._installed()
            self._installed = None
        self.reset()

    def reset(self) -> None:
        """Forgets this thread's calls that are under way, whose forwards were interrupted, and copies of parameters."""
        self._thread.forget()
        self.registry.forget()

    def look_again(self, name: str) -> None:
        """Forgets where a block was used: it isn't used there any more."""
        self._places.pop(name, None)

    def _enter(self, module: nn.Module, _args: Any) -> None:
        if id(module) not in self._ids or torch.compiler.is_compiling():
            return
        thread = self._thread
        if thread.start != self._start:  # a forward of this thread was under way when the hooks went
            thread.forget()
            thread.start = self._start
        if not thread.modules:
            self._observed.begin_calls()
        thread.modules.append(module)
        if thread.mode is None and id(module) in self._entries:
            thread.mode, thread.mode_depth = OperationMode(self), len(thread.modules)
            thread.mode.__enter__()
        if module is self._model:
            self._observed.begin_forward()

    def _leave(self, module: nn.Module, *call: Any) -> None:
        # Called with (args, kwargs, output), but with (args, output) where the forward raised an error.
        thread = self._thread
        if torch.compiler.is_compiling() or not any(each is module for each in thread.modules):
            return
        while thread.modules and thread.modules.pop() is not module:
            pass  # one whose forward ended by what isn't an Exception
        if thread.mode is not None and len(thread.modules) < thread.mode_depth:
            leave_function_mode(thread.mode)
            thread.mode = None
        if module is self._model:
            self._observed.end_forward(module, call[:-1], call[-1])

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
        if self._installed is None or self._thread.start != self._start:
            return  # the rest of a forward that the end of watching overtook
        used = [each for each in tensors_in((args, kwargs)) if self.registry.knows(each)]
        moved = function in MOVES and len(list(tensors_in((args, kwargs)))) == 1
        if (function in COPIES or moved) and not odd:
            self.registry.note_copy(output, used[0])
            return
        readable = function in PRODUCTS and not odd
        product = product_of(function, args, kwargs, self.registry.knows) if readable else None
        if (
            product is None
            and not odd
            and any(self.registry.is_table(name) for name, _ in self.registry.users(used[0]))
        ):
            numbers = picked_rows(function, args, kwargs)
            product = None if numbers is None else looked_up(used[0], numbers.detach() % len(used[0]))
        parts = [] if product is None else self.registry.parts(product)
        handled: list[Tensor] = []
        if product is not None and parts:
            handled = self._use(parts, product, output)
            if product.operation == LOOKUP:
                self._thread.lookups.note(output, Lookup(product, parts), plain=True)
        elif self.registry.note_picked(output, used[0], picked_entries(function, args, kwargs)):
            return
        elif function in SUMS:
            pair = addends(args, kwargs)
            handled = self._add_bias(pair, changes=int(function is Tensor.add_)) + self._add_rows(pair, output)
        of_units: set[tuple[int, str]] = set()
        for use in () if odd else affine_uses(function, args, kwargs, output, product):
            of_units |= self._scale_or_shift(use, output)
        for each in used:
            done = any(each is other for other in handled)
            for name, as_bias in self.registry.users(each):
                if function in LOOKUPS and self.registry.is_looked_up(name):
                    continue  # which `coverage()` says
                if (id(each), name) not in of_units and not (done and not self.registry.is_of_units(name)):
                    self.unhandled[name, as_bias].add(f"{_named(function, args, kwargs)} {odd}".strip())

    def _scale_or_shift(self, use: Affine, output: Tensor) -> set[tuple[int, str]]:
        """Units were scaled or shifted; returns the tensors, by id, whose use is measured, and of which block."""
        columns, module = self.registry.scaled_or_shifted(use, output), self._thread.modules[-1]
        if columns:
            self._observed.affine(columns, use, output, training=module.training)
        for each in columns:
            self._places.setdefault(each.block, set()).add(id(module))
        return {(id(tensor), each.block) for each in columns for tensor in (use.scale, use.shift)}

    def _use(self, parts: Sequence[Part], product: Product, output: Tensor) -> list[Tensor]:
        """Blocks' weights were used; returns the parameters whose use is measured."""
        thread = self._thread
        module, with_bias = thread.modules[-1], [part for part in parts if part.block in self._with_bias]
        for part in parts:
            self._places.setdefault(part.block, set()).add(id(module))
        for part in with_bias:
            self.biased[part.block] = self.biased.get(part.block, False) or part.biased
        if product.bias is None and with_bias:
            thread.waiting[id(output)] = _Waiting(
                weakref.ref(output), changes_in_place(output), with_bias, product.features
            )
        self._observed.product(parts, product, output, training=module.training)
        handled = [product.weight]
        if product.bias is not None and any(part.biased for part in parts):
            handled.append(product.bias)
        return handled

    def saw_rows(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        """An operation had looked-up rows among its arguments, and no block's parameter, and made another tensor."""
        if self._installed is None or self._thread.start != self._start:
            return
        lookups, given = self._thread.lookups, list(tensors_in((args, kwargs)))
        handled = self._add_rows(addends(args, kwargs), output) if function in SUMS else []
        others = [each for each in given if lookups.of(each) is None]
        for rows in given:
            lookup = lookups.of(rows)
            if lookup is None or any(rows is each for each in handled):
                continue
            lookup.others.add(function.__name__)
            if rows.numel() >= output.numel() and not any(each.requires_grad for each in others):
                lookups.note(output, lookup, plain=False)
            elif others and output.dim() and len(output) > 1 and is_shared(rows, output):
                lookup.measure_elsewhere()
            self._note_others(lookup)

    def _add_rows(self, pair: tuple[Tensor, Tensor] | None, output: Tensor) -> list[Tensor]:
        """Two tensors were added; returns those that are measured in the sum, as rows of a table."""
        handled = []
        for rows, product, lookup in self._thread.lookups.met(pair, output, self.registry):
            parts = self.registry.parts(product)
            if parts:
                self._use(parts, product, output)
                handled.append(rows)
            if parts and lookup is not None:
                lookup.measure_elsewhere()
                self._note_others(lookup)
        return handled

    def _note_others(self, lookup: Lookup) -> None:
        """Notes uses of rows that aren't measured, unless the lookup itself is: that has all of them."""
        if lookup.others and not lookup.is_measured:
            said, lookup.said = lookup.said, f"{', '.join(sorted(lookup.others))} of rows that all examples share"
            for part in lookup.parts:
                self.unhandled[part.block, False].discard(said)
                self.unhandled[part.block, False].add(lookup.said)

    def _add_bias(self, pair: tuple[Tensor, Tensor] | None, *, changes: int) -> list[Tensor]:
        """Two tensors were added; returns the one that is the bias of the product that the other one is, if so.

        Args:
            pair: Both; None where it was no plain sum.
            changes: How often that changed the first one in place.
        """
        thread, handled = self._thread, []
        for product, bias in () if pair is None else (pair, pair[::-1]):
            waiting = thread.waiting.get(id(product))
            if waiting is None or waiting.output() is not product or not _lies_along(bias, waiting.features):
                continue
            version = changes_in_place(product)
            if version is not None and waiting.version != version - changes:
                continue
            for part in waiting.parts:
                if not part.biased and self.registry.is_bias(bias, part.block, part.rows.start):
                    part.biased = self.biased[part.block] = True
                    self._places[part.block].add(id(thread.modules[-1]))
                    handled = [bias]
        return handled


def _named(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Returns how to call an operation that can't be measured."""
    indexed = picked_rows(function, args, kwargs) is not None
    return "a lookup of rows by number outside of nn.Embedding" if indexed else function.__name__


def _lies_along(bias: Tensor, features: int) -> bool:
    """Whether a bias of several entries has them along one dimension, counted from the end, and is added along it."""
    return bias.dim() >= -features and bias.shape[features] == bias.numel()


def _call(method: weakref.WeakMethod[Callable[..., None]], arguments: Sequence[Any]) -> None:
    bound = method()
    if bound is not None:
        bound(*arguments)


def _remove(handles: Sequence[RemovableHandle], eager: EagerSteps | None, thread: _Thread) -> None:
    thread.forget()
    for handle in handles:
        handle.remove()
    if eager is not None:
        eager.close()
