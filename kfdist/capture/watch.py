"""Watches the operations of a model while its modules' forwards run, and reports those that use a block's parameters.

What a layer's weight is multiplied with is seen at the operation itself, not at the call of the module that holds it:
the two differ where a forward uses another module's weight, where a module's forward or output is replaced, and where
activations change the output in place. Hooks are global ones of `nn.Module`, installed while something is due and then
removed, so that nothing is ever left on the model: it can be copied, pickled and compiled as if nobody watched.
"""

import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from kfdist.capture.lookups import LookupLog
from kfdist.capture.made_of_parameters import MadeOfParameters
from kfdist.capture.operation_mode import OperationMode, SeesOperations
from kfdist.capture.registry import Registry
from kfdist.capture.saved_inputs import SaveLog
from kfdist.capture.seen_uses import Observed, SeenUses, WatchedForward
from kfdist.curvature.blocks import Block
from kfdist.torch_internals import EagerSteps, eager_steps, leave_function_mode


class _Thread(threading.local):
    """Where a thread is among the model's modules, and since which of them it is watched."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.mode: OperationMode | None = None
        self.mode_depth = 0
        self.start = 0

    def forget(self) -> None:
        """Forgets this thread's calls under way, and takes its mode off its stack; other threads go on in theirs."""
        if self.mode is not None:
            leave_function_mode(self.mode)
        self.modules, self.mode = [], None


class Watch(SeesOperations):
    """Watches one model.

    The first time a block is due every module is watched; from then on those in whose own forward it was used.

    Args:
        model: The bare model.
        blocks: What is looked for.
        observed: Is told.

    Attributes:
        uses: What was seen.
    """

    def __init__(self, model: nn.Module, blocks: Collection[Block], observed: Observed) -> None:
        self._model = model
        self._ids = {id(module) for module in model.modules()}
        self._observed: Observed = weakref.proxy(observed)
        self.uses = SeenUses(blocks, self._observed, model)
        self._entries: Set[int] = frozenset()
        self._thread = _Thread()
        self._start = 0
        self._installed: weakref.finalize[..., Watch] | None = None

    @property
    def looked(self) -> bool:
        """Whether any use was seen; before, every module is watched."""
        return bool(self.uses.places)

    def start(self, names: Collection[str]) -> None:
        """Watches for the blocks `names` until `stop`, or until it is told others."""
        known = all(name in self.uses.places for name in names)
        self._entries = set().union(*(self.uses.places[name] for name in names)) if known else self._ids
        if self._installed is None:
            # The hooks hold no more than a weak reference: with a forgotten watch they go.
            enter, leave = weakref.WeakMethod(self._enter), weakref.WeakMethod(self._leave)
            handles = [
                register_module_forward_pre_hook(lambda *call: _call(enter, call)),
                register_module_forward_hook(lambda *call: _call(leave, call), with_kwargs=True, always_call=True),
            ]
            self._installed = weakref.finalize(self, _remove, handles, eager_steps(), self._thread, self.uses.forward)
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
        self.uses.forget()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if id(module) not in self._ids or torch.compiler.is_compiling():
            return
        thread = self._thread
        if thread.start != self._start:  # a forward of this thread was under way when the hooks went
            thread.forget()
            self.uses.forward.forget()
            thread.start = self._start
        outermost = not thread.modules
        if outermost:
            self._observed.begin_calls()
            self.made.begin(args)
        pauses = self._observed.pauses
        if pauses and thread.mode is None and module is not self._model:
            return
        thread.modules.append(module)
        if thread.mode is None and not pauses and id(module) in self._entries:
            thread.mode, thread.mode_depth = OperationMode(self), len(thread.modules)
            thread.mode.__enter__()
        if outermost or module is self._model:
            self._observed.begin_forward(whole=module is self._model)

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
        self._observed.end_call(call[:-1], turned=getattr(module, "batch_first", None) is False)
        if not thread.modules or module is self._model:
            self._observed.end_forward(module, call[:-1], call[-1])

    @property
    def registry(self) -> Registry:
        """The blocks' parameters."""
        return self.uses.registry

    @property
    def lookups(self) -> LookupLog:
        """What was looked up in this thread's forward."""
        return self.uses.forward.lookups

    @property
    def saved(self) -> SaveLog:
        """What the last operation of this thread has saved."""
        return self.uses.forward.saved

    @property
    def made(self) -> MadeOfParameters:
        """What this thread's forward has made of parameters alone."""
        return self.uses.forward.made

    @override
    def saw(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor, odd: str
    ) -> None:
        if not self._was_overtaken:
            self.uses.see(self._thread.modules[-1], function, args, kwargs, output, odd)

    @override
    def saw_rows(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        if not self._was_overtaken:
            self.uses.see_rows(self._thread.modules[-1], function, args, kwargs, output)

    @property
    def _was_overtaken(self) -> bool:
        """Whether this is the rest of a forward that the end of watching overtook."""
        return self._installed is None or self._thread.start != self._start


def _call(method: weakref.WeakMethod[Callable[..., None]], arguments: Sequence[Any]) -> None:
    bound = method()
    if bound is not None:
        bound(*arguments)


def _remove(
    handles: Sequence[RemovableHandle], eager: EagerSteps | None, thread: _Thread, forward: WatchedForward
) -> None:
    thread.forget()
    forward.forget()
    for handle in handles:
        handle.remove()
    if eager is not None:
        eager.close()
