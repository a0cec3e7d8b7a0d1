"""Inputs of operations as autograd saves them, where somebody's hooks keep them elsewhere or make them anew.

Non-reentrant activation checkpointing drops what its layers save and computes it again in the backward. A layer's input
that was referenced until then would be there all the same, and the checkpoint save nothing on steps that measure. So
what autograd packs is noted while the operation runs, and read when its node has unpacked it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from kfdist.torch_internals import NO_BACKWARD, keeps_graph, running_backward, top_saved_tensors_hooks

Gradients = tuple[Tensor | None, ...]
"""As hooks of nodes are given them."""

_SAVE_INPUTS = frozenset({"AddmmBackward0", "MmBackward0", "ConvolutionBackward0"})
"""Nodes that unpack the input of a product themselves: behind others it is another node that does."""


class SavedInput:
    """A tensor that an operation saved.

    Attributes:
        tensor: What was unpacked, shaped like what the operation was given, until `let_go`.
    """

    def __init__(self, saved: Tensor) -> None:
        self._place, self._dtype = saved.data_ptr(), saved.dtype
        self._shape, self._contiguous = saved.shape, saved.is_contiguous()
        self._given: torch.Size | None = None
        self.tensor: Tensor | None = None

    def is_of(self, given: Tensor) -> bool:
        """Says whether it has the numbers of an operation's argument, as they were or as autocast converted them."""
        alike = self._shape == given.shape or (self._contiguous and given.is_contiguous())
        same = self._dtype != given.dtype or self._place == given.data_ptr()
        same_size = self._shape.numel() == given.numel() and self._shape[-1:] == given.shape[-1:]
        return alike and same and same_size

    def want(self, given: Tensor) -> None:
        """Has it kept when it is unpacked, shaped like an argument."""
        self._given = given.shape

    def unpacked(self, saved: Tensor) -> None:
        """Takes what its node was given."""
        if self._given is not None:
            self.tensor = saved.detach().reshape(self._given)

    def let_go(self, *_gradients: Any) -> None:
        """Its node has run: it isn't needed any more, unless another backward may add to the output's gradient."""
        if not keeps_graph():
            self.tensor = None


class SaveLog:
    """What the last operation of a thread has saved under somebody's hooks."""

    def __init__(self) -> None:
        self._found: list[SavedInput] = []

    def forget(self) -> None:
        """Forgets it."""
        self._found = []

    def call(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Calls an operation, and notes what it saves where somebody has hooks on that.

        Not inside of a backward, where checkpointing makes it once more: it is the first one that is waited for.
        """
        self._found = found = []
        hooks = top_saved_tensors_hooks() if running_backward() == NO_BACKWARD else None
        if hooks is None:
            return function(*args, **kwargs)
        pack, unpack = hooks

        def note(saved: Tensor) -> tuple[Any, SavedInput | None]:
            known = SavedInput(saved) if saved.layout is torch.strided else None
            found.extend([] if known is None else [known])
            return pack(saved), known

        def give(packed: tuple[Any, SavedInput | None]) -> Tensor:
            saved = unpack(packed[0])
            if packed[1] is not None:
                packed[1].unpacked(saved)
            return saved

        with torch.autograd.graph.saved_tensors_hooks(note, give):
            return function(*args, **kwargs)

    def input_of(self, node: Node, given: Tensor) -> SavedInput | None:
        """Returns the input of the last operation, which is read after its node has run; None where it can't be told.

        Args:
            node: Where the gradient of its output comes.
            given: The input.
        """
        alike = [each for each in self._found if each.is_of(given)] if node.name() in _SAVE_INPUTS else []
        if len(alike) != 1:
            return None
        alike[0].want(given)
        return alike[0]


def tell_when_there(node: Node, given: Tensor | SavedInput, told: Callable[[Gradients], None]) -> None:
    """Has a node's output gradients told in each backward: before it runs or, where it saves what is wanted, after."""
    if isinstance(given, SavedInput):
        node.register_hook(partial(_after, told))
    else:
        node.register_prehook(told)


def _after(told: Callable[[Gradients], None], _inputs: Gradients, outputs: Gradients) -> None:
    told(outputs)


def let_go_after(node: Node, given: Sequence[Tensor | SavedInput]) -> None:
    """Lets go of what a node has saved once it has run and all are told, each once."""
    for each in {id(each): each for each in given}.values():
        if isinstance(each, SavedInput):
            node.register_hook(each.let_go)
