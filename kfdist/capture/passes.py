"""Which forward of the model a layer's call belongs to, also when the call happens in the middle of a backward.

Reentrant activation checkpointing runs layers a second time, inside the backward, and starts a nested backward for
them. Autograd numbers its nodes in the order they are made, so the node that asks for the second run tells which
forward made it.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from kfdist.torch_internals import NO_BACKWARD, next_node, running_backward, running_node


@dataclass(eq=False)
class ForwardPass:
    """One call of the model, or of a module inside by itself.

    Attributes:
        examples: How many examples it was given, known at its end; None outside of any module, and where no tensor is
            among what was given.
        captured: Whether its layers are measured; not so inside `Capture.paused`.
        whole: Whether the model was called as a whole, so that its output tells when a backward begins; else it is the
            call of a module inside, as a Lightning module makes it, or of none.
        outer_backward: The backward it was run again in, as a whole, by reentrant checkpointing.
        first_node: Number of the first autograd node made after its start.
        end_node: Number of the first autograd node made after its end.
        thread: What stands for the one that made it; each thread numbers its nodes by itself.
        inputs: Dimensions and dim 0 of what its modules were given first, also of those that aren't measured: how many
            examples there are mustn't depend on what is due.
        measured: Whether any layer of it is.
        turned: The first two dimensions of what modules with `batch_first=False` were given: dim 1 has the examples.
        time_first: Whether the model itself was given its examples along dim 1.
        outputs: Dim 0 of what the model made, where no tensor was among what it was given.
        doubt: Why `examples` may not be how many terms the loss averages; empty where nothing speaks against it.
    """

    examples: int | None
    captured: bool
    whole: bool
    outer_backward: int
    first_node: int
    end_node: int
    thread: object = None
    inputs: set[tuple[int, int]] = field(default_factory=set)
    measured: bool = False
    turned: set[tuple[int, int]] = field(default_factory=set)
    time_first: bool = False
    outputs: int | None = None
    doubt: str = ""

    def is_turned(self, shape: Sequence[int], *, inside: bool = False) -> bool:
        """Whether a tensor of this shape, its features last, has the examples along dim 1.

        It has if such modules were given these dimensions, or if it has three, dim 1 has as many entries as there are
        examples and dim 0 has more, but no multiple: those are also of examples' windows or frames, folded into dim 0.
        Of two dimensions: where time steps are one after another, each with all examples.

        Args:
            shape: The shape.
            inside: Whether it is from inside of such a module.
        """
        n = self.examples
        if not n or len(shape) < 2:
            return False
        if len(shape) == 2:
            turned = self.time_first or (inside and any(second == n for _, second in self.turned))
            return turned and shape[0] > n and shape[0] % n == 0
        if shape[1] != n:
            return False
        alone = len(shape) == 3 and shape[0] > n and shape[0] % n != 0
        return alone or ((shape[0], n) in self.turned and (inside or shape[0] != n))


class _Thread(threading.local):
    """A thread's forward under way, and the one that a backward in it repeats.

    Its token tells it from threads that have ended, whose identifiers new ones get.
    """

    def __init__(self) -> None:
        self.token = object()
        self.open: ForwardPass | None = None
        self.rerun: ForwardPass | None = None


class Paused(threading.local):
    """How many `paused` a thread is in: rollouts in one thread don't pause the training in another."""

    def __init__(self) -> None:
        self.depth = 0


class PassLog:
    """The forwards since the last step, of one model."""

    def __init__(self) -> None:
        self._passes: list[ForwardPass] = []
        self._thread = _Thread()
        self._start = next_node()

    def begin_calls(self) -> None:
        """Layers are called from outside of the model; outside of a backward they repeat no earlier forward."""
        if running_backward() == NO_BACKWARD:
            self._thread.rerun = None

    def begin(self, *, captured: bool, whole: bool) -> None:
        """The model's forward starts, or is repeated by checkpointing; or the call of a module inside, without it."""
        repeated = running_backward() != NO_BACKWARD
        if repeated and not whole:
            return  # the graph knows which forward it repeats
        node = next_node()
        # Checkpointing the whole model makes its node just before it calls the model, without gradients.
        first = node if torch.is_grad_enabled() else node - 1
        captured = self._of_running_node().captured if repeated else captured
        self._thread.open = ForwardPass(None, captured, whole, running_backward(), first, node, self._thread.token)

    def called(self, inputs: Any, *, turned: bool) -> None:
        """A module inside, which takes examples along dim 1 if it is `turned`, was given these arguments."""
        forward = self._thread.open
        if forward is None:
            return
        given = [each for each in tensors_in(inputs) if each.dim() and not each.is_nested]
        forward.inputs |= {(each.dim(), each.size(0)) for each in given[:1]}
        if turned:
            shapes = [each.shape for each in given if each.dim() == 3]  # others of other features are masks
            forward.turned |= {(each[0], each[1]) for each in shapes if each[1:] == shapes[0][1:]}

    def end(self, inputs: Any, output: Any) -> ForwardPass | None:
        """The forward that has begun, of these arguments, ends; returns it."""
        done, self._thread.open = self._thread.open, None
        if done is not None:
            first, among = _first_tensor(inputs)
            done.time_first = (
                first is not None
                and first.dim() > 1
                and not first.is_nested
                and first.size(0) != first.size(1)
                and (first.size(0), first.size(1)) in done.turned
            )
            done.examples = None if first is None else first.size(int(done.time_first))  # nested tensors have no shape
            if first is not None and among and (first.dim() + 1, len(among)) in done.inputs:
                done.examples = len(among)
                done.doubt = (
                    "the model was given a list of tensors and made one batch of them (images, for detection): their "
                    f"number, {len(among)}, is taken for the number of terms that the loss averages"
                )
            elif first is None and done.whole:
                sizes = (each.size(0) for each in tensors_in(output) if each.dim() and each.requires_grad)
                done.outputs = next(sizes, None)
                done.doubt = _doubt_of_object(done.outputs)
            elif done.examples and done.measured and done.whole:
                done.doubt = _doubt_of_output(done.examples, output, inputs, time_first=done.time_first)
            done.end_node = next_node()
            self._passes.append(done)
        return done

    def forward_of_call(self, *, captured: bool, nested: bool) -> ForwardPass:
        """Returns the forward that the layer's call going on right now belongs to.

        Args:
            captured: Whether a call outside of the model's forward is measured.
            nested: Whether the running backward is one that checkpointing started inside another one.

        Returns:
            The model's forward; for a call outside of it, a forward of its own; for a call that checkpointing repeats,
            the forward that made it first, not captured if that was before the last step.
        """
        thread = self._thread
        if thread.open is not None:
            return thread.open
        if running_backward() == NO_BACKWARD:
            thread.rerun = None
            return ForwardPass(None, captured, False, NO_BACKWARD, 0, 0)
        if not nested or thread.rerun is None:  # a nested backward's nodes are younger than the forward they belong to
            thread.rerun = self._of_running_node()
        return thread.rerun

    def forget(self) -> None:
        """A step was done: forwards before it no longer count."""
        self._passes.clear()
        self._thread = _Thread()
        self._start = next_node()

    def _of_running_node(self) -> ForwardPass:
        node = running_node()
        number = self._start if node is None else node
        # On a device backwards have threads of their own, in which no forward was made.
        threads = {each.thread for each in self._passes} & {self._thread.token}
        for each in self._passes:
            if threads and each.thread not in threads:
                continue
            if each.first_node <= number < each.end_node:
                return each
        return ForwardPass(None, number >= self._start, False, running_backward(), number, number)


def _first_tensor(value: Any) -> tuple[Tensor | None, Sequence[Any]]:
    """Returns the first tensor with a dimension, and the list of tensors that it is an element of; empty otherwise."""
    first = next((each for each in tensors_in(value) if each.dim()), None)

    def holding(value: Any) -> Sequence[Any]:
        parts = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else []
        if isinstance(value, list) and parts and parts[0] is first and all(isinstance(each, Tensor) for each in parts):
            return parts
        return next(filter(None, map(holding, parts)), [])

    return first, [] if first is None else holding(value)


def _doubt_of_output(examples: int, output: Any, inputs: Any, *, time_first: bool) -> str:
    """Says that no output is of so many examples, nor of so many times the same number of tokens; empty otherwise.

    Where there are as many outputs as another input has entries, that one has the examples (`model(temperature, x)`).
    """
    outputs = [each for each in tensors_in(output) if each.dim() and each.requires_grad]
    sizes = [each.size(0) for each in outputs]
    given = {each.size(0) for each in tensors_in(inputs) if each.dim()}
    if not sizes or examples in sizes or any(size % examples == 0 and size not in given for size in sizes):
        return ""
    if time_first and any(each.dim() > 1 and each.size(1) == examples for each in outputs):
        return ""
    if time_first:
        return (
            f"a module with batch_first=False takes dim 1 of the model's first input, {examples}, for the examples, of "
            f"which its output, with {sizes[0]} along dim 0, has another number"
        )
    return (
        f"dim 0 of the model's first input is {examples} and of its output {sizes[0]} (as where texts, graphs or "
        "sequences lie end to end, dim 0 is time, or another input has the examples), so that the first may not be the "
        "number of examples"
    )


def _doubt_of_object(outputs: int | None) -> str:
    """Says what is taken for the number of terms where the model was given no tensor."""
    taken = "of each layer's own input" if outputs is None else f"of its output, {outputs},"
    return (
        "no tensor was found in what the model was given (an object of a class of its own, such as a graph?), so that "
        f"dim 0 {taken} is taken for the number of terms that the loss averages"
    )


def tensors_in(value: Any) -> list[Tensor]:
    """Returns the tensors of a model's inputs or outputs, in order."""
    found: list[Tensor] = []
    _collect(value, found)
    return found


_WITHOUT_TENSORS = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size, slice})
"""What most arguments are: told at once, as every operation's arguments are walked on a step that measures."""

_PLAIN = frozenset({tuple, list})
"""What holds them: whether something else is a tensor is asked of torch, which takes as long as all the rest."""


def _collect(value: Any, found: list[Tensor]) -> None:
    kind = type(value)
    if kind in _WITHOUT_TENSORS:
        return
    if kind is Tensor or (kind not in _PLAIN and isinstance(value, Tensor)):
        found.append(value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, found)
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect(item, found)
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            _collect(getattr(value, each.name, None), found)  # one that was never set has none
