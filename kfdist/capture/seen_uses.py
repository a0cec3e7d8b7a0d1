"""Which operations use a block's parameters, and how: what the operations of a forward, one by one, say of them."""

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from kfdist.capture.affine import MOVES, REFLECTIONS, Affine, Columns, affine_uses
from kfdist.capture.lookups import Lookup, LookupLog, is_shared
from kfdist.capture.made_of_parameters import MadeOfParameters, Origins, origins_in
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
from kfdist.capture.saved_inputs import SaveLog
from kfdist.curvature.blocks import Block, LayerBlock
from kfdist.curvature.blocks.embedding import LOOKUP
from kfdist.torch_internals import changes_in_place


class Observed(Protocol):
    """What wants to know of a model's forward."""

    @property
    def pauses(self) -> bool:
        """Whether what is called now isn't wanted; of the model as a whole, that it was called still is."""
        ...

    def begin_calls(self) -> None:
        """A module of the model is called from outside of the model."""

    def begin_forward(self, *, whole: bool) -> None:
        """The model is called as a whole, or a module inside from outside of it."""

    def end_call(self, inputs: Any, *, turned: bool) -> None:
        """The call of a module with these arguments has ended; a `turned` one takes examples along dim 1."""

    def end_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """That call, of this module, has ended; `inputs` are its arguments, `output` is None where it failed."""

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


class WatchedForward(threading.local):
    """What a thread's forward has made, and may yet meet something.

    Args:
        given: As `MadeOfParameters` takes it. It must not hold the model, which may hold whoever watches it.
        multiplied: As `SeenUses` has it, of all threads.
    """

    def __init__(self, given: Origins, multiplied: set[int]) -> None:
        self.waiting: dict[int, _Waiting] = {}
        self.lookups = LookupLog()
        self.saved = SaveLog()
        self.made = MadeOfParameters(given, multiplied)

    def forget(self) -> None:
        """Starts afresh."""
        self.waiting, self.lookups = {}, LookupLog()
        self.saved.forget()
        self.made.forget()


class SeenUses:
    """The uses of some blocks' parameters.

    Args:
        blocks: What is looked for.
        observed: Is told of them.
        model: The model.

    Attributes:
        registry: The blocks' parameters.
        unhandled: Functions that used a block's weight (or its bias, where the second is true) and can't be measured.
        biased: Whether the bias is added, of each block with one whose weight was used.
        multiplied: The parameters, by id, that went into a product with an input, by themselves or by what was made of
            them.
        places: The modules, by id, in whose own forward each block was used.
        forward: This thread's.
    """

    def __init__(self, blocks: Collection[Block], observed: Observed, model: nn.Module) -> None:
        self._observed = observed
        self._with_bias = {block.name for block in blocks if block.has_bias and isinstance(block, LayerBlock)}
        self.registry = Registry(blocks)
        self.unhandled: dict[tuple[str, bool], set[str]] = defaultdict(set)
        self.biased: dict[str, bool] = {}
        self.places: dict[str, set[int]] = {}
        self.multiplied: set[int] = set()
        self.forward = WatchedForward(origins_in(model), self.multiplied)

    def forget(self) -> None:
        """Forgets what this thread's forward has made, and copies of parameters."""
        self.forward.forget()
        self.registry.forget()

    def look_again(self, name: str) -> None:
        """Forgets where a block was used: it isn't used there any more."""
        self.places.pop(name, None)

    def see(
        self,
        module: nn.Module,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        output: Tensor,
        odd: str,
    ) -> None:
        """Takes an operation on a block's parameter; see `SeesOperations.saw`. It runs in the forward of `module`."""
        given = tensors_in((args, kwargs))
        used = [each for each in given if self.registry.knows(each)]
        moved = len(given) == 1 and (
            function in MOVES
            or (function in REFLECTIONS and not _is_scaled(args, kwargs) and self.registry.is_bare(used[0]))
        )
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
        alone = self.forward.made.holds(output)
        for part in parts:
            part.alone = alone
        handled: list[Tensor] = []
        if product is not None and parts:
            handled = self._use(module, parts, product, output)
            if product.operation == LOOKUP:
                self.forward.lookups.note(output, Lookup(product, parts), plain=True)
        elif self.registry.note_picked(output, used[0], picked_entries(function, args, kwargs)):
            return
        elif function in SUMS:
            pair = addends(args, kwargs)
            handled = self._add_bias(module, pair, changes=int(function is Tensor.add_)) + self._add_rows(
                module, pair, output
            )
        of_units: set[tuple[int, str]] = set()
        for use in () if odd else affine_uses(function, args, kwargs, output, product):
            of_units |= self._scale_or_shift(module, use, output, alone=alone)
        for each in used:
            done = any(each is other for other in handled)
            for name, as_bias in self.registry.users(each):
                if function in LOOKUPS and self.registry.is_looked_up(name):
                    continue  # which `coverage()` says
                if (id(each), name) not in of_units and not (done and not self.registry.is_of_units(name)):
                    self.unhandled[name, as_bias].add(f"{_named(function, args, kwargs)} {odd}".strip())

    def _scale_or_shift(self, module: nn.Module, use: Affine, output: Tensor, *, alone: bool) -> set[tuple[int, str]]:
        """Units were scaled or shifted; returns the tensors, by id, whose use is measured, and of which block."""
        columns = [replace(each, alone=alone) for each in self.registry.scaled_or_shifted(use, output)]
        if columns:
            self._observed.affine(columns, use, output, training=module.training)
        for each in columns:
            self.places.setdefault(each.block, set()).add(id(module))
        return {(id(tensor), each.block) for each in columns for tensor in (use.scale, use.shift)}

    def _use(self, module: nn.Module, parts: Sequence[Part], product: Product, output: Tensor) -> list[Tensor]:
        """Blocks' weights were used; returns the parameters whose use is measured."""
        with_bias = [part for part in parts if part.block in self._with_bias]
        for part in parts:
            self.places.setdefault(part.block, set()).add(id(module))
        for part in with_bias:
            self.biased[part.block] = self.biased.get(part.block, False) or part.biased
        if product.bias is None and with_bias:
            self.forward.waiting[id(output)] = _Waiting(
                weakref.ref(output), changes_in_place(output), with_bias, product.features
            )
        self._observed.product(parts, product, output, training=module.training)
        handled = [product.weight]
        if product.bias is not None and any(part.biased for part in parts):
            handled.append(product.bias)
        return handled

    def see_rows(
        self,
        module: nn.Module,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        output: Tensor,
    ) -> None:
        """Takes an operation on looked-up rows; see `SeesOperations.saw_rows`."""
        lookups, given = self.forward.lookups, tensors_in((args, kwargs))
        handled = self._add_rows(module, addends(args, kwargs), output) if function in SUMS else []
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

    def _add_rows(self, module: nn.Module, pair: tuple[Tensor, Tensor] | None, output: Tensor) -> list[Tensor]:
        """Two tensors were added; returns those that are measured in the sum, as rows of a table."""
        handled = []
        for rows, product, lookup in self.forward.lookups.met(pair, output, self.registry):
            parts = self.registry.parts(product)
            if parts:
                self._use(module, parts, product, output)
                handled.append(rows)
            if parts and lookup is not None:
                lookup.measure_elsewhere()
                self._note_others(lookup)
        return handled

    def _note_others(self, lookup: Lookup) -> None:
        """Notes uses of rows that aren't measured, unless the lookup itself is: that has all of them."""
        if lookup.others and not lookup.is_measured:
            said, others = lookup.said, ", ".join(sorted(lookup.others))
            lookup.said = f"operations on rows that all examples share ({others})"
            for part in lookup.parts:
                self.unhandled[part.block, False].discard(said)
                self.unhandled[part.block, False].add(lookup.said)

    def _add_bias(self, module: nn.Module, pair: tuple[Tensor, Tensor] | None, *, changes: int) -> list[Tensor]:
        """Two tensors were added; returns the one that is the bias of the product that the other one is, if so.

        Args:
            module: In whose forward.
            pair: Both; None where it was no plain sum.
            changes: How often that changed the first one in place.
        """
        handled: list[Tensor] = []
        for product, bias in () if pair is None else (pair, pair[::-1]):
            waiting = self.forward.waiting.get(id(product))
            if waiting is None or waiting.output() is not product or not _lies_along(bias, waiting.features):
                continue
            version = changes_in_place(product)
            if version is not None and waiting.version != version - changes:
                continue
            for part in waiting.parts:
                if not part.biased and self.registry.is_bias(bias, part.block, part.rows.start):
                    part.biased = self.biased[part.block] = True
                    self.places[part.block].add(id(module))
                    handled = [bias]
        return handled


def _named(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Returns how to call an operation that can't be measured."""
    indexed = picked_rows(function, args, kwargs) is not None
    return "a lookup of rows by number outside of nn.Embedding" if indexed else function.__name__


def _is_scaled(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a subtraction multiplies what it subtracts: `torch.rsub(p, 1, alpha=2)` is 1 - 2 p."""
    return {**dict(zip(("input", "other", "alpha"), args, strict=False)), **kwargs}.get("alpha", 1) != 1


def _lies_along(bias: Tensor, features: int) -> bool:
    """Whether a bias of several entries has them along one dimension, counted from the end, and is added along it."""
    return bias.dim() >= -features and bias.shape[features] == bias.numel()
