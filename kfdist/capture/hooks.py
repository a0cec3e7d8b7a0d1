"""Forward and backward hooks that collect each due block's batch statistics; nothing else.

Scaling (algorithms.md 0.2): the loss is a mean over N examples, so autograd's output gradient is g/N and with k
backwards of loss/k it is g/(N k); under a GradScaler it is also multiplied by the scale. N is undone at each backward,
k once its final value is known, at the step. A sum is kept per block, never the rows.
"""

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kfdist.capture.passes import NO_BACKWARD, ForwardPass, PassLog, current_backward
from kfdist.curvature.blocks import Block
from kfdist.curvature.estimate import BatchStatistics
from kfdist.errors import ConfigError, KfdistError

_EXAMPLES_SEED = 0x5851F42D4C957F2D
"""Keeps the draw of examples independent of the draw of positions, which has the block's own seed."""

_SEED_MASK = (1 << 63) - 1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How much of a batch is measured; both estimates stay unbiased.

    Attributes:
        examples_fraction: Share of the examples, in (0, 1].
        positions_fraction: Share of the positions of a convolution or a sequence, in (0, 1].
    """

    examples_fraction: float = 1.0
    positions_fraction: float = 1.0

    def __post_init__(self) -> None:
        for name in ("examples_fraction", "positions_fraction"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= 1.0:
                raise ConfigError(f"{name} is {value!r}; a number in (0, 1] is needed")


@dataclass
class _Pending:
    """One block's sums since the last step."""

    A: Tensor
    G: Tensor
    rows: float = 0.0
    examples: float = 0.0
    calls: int = 0
    counted: set[tuple[int, ForwardPass | None]] = field(default_factory=set)


@dataclass(frozen=True)
class _Call:
    """What a hook has to remember of a layer's call until its backward."""

    activation: Tensor
    version: int | None
    forward: ForwardPass
    generation: int
    rerun_in: int


class Capture:
    """Collects the statistics of the blocks that are due, between two steps.

    A block is measured when its layer runs in training mode with gradients on, the block is armed and capture is not
    paused, and a backward follows before the next step. Several forwards before one backward add up, for a loss that is
    the sum of their means; so do several backwards, each of which counts as one micro-batch, whose loss the caller
    divided by their number. Between a forward and its backward the inputs of armed layers are referenced, not copied
    (so non-reentrant checkpointing frees them no sooner than the backward, on the steps that measure).

    `torch.autograd.grad` through a captured forward counts as a backward; make such forwards (a gradient penalty, an
    adversarial example) inside `paused`. Copies of the model have copies of these hooks, which do nothing.

    Args:
        model: The bare model (not its DDP wrapper); dim 0 of its first tensor input is the number of examples. Where a
            layer is called without calling the model as a whole, it is dim 0 of the layer's input.
        blocks: The blocks to measure, by name.
        aliases: Further modules tied to a block's parameters, by block name; their calls add to it.
        sampling: How much of a batch is measured.
        grad_scaler: The scaler whose scale is in the output gradients, or None.

    Attributes:
        saw_forward: Whether any hook ever ran. Code that torch.compile made before the hooks were there runs none.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, Block],
        *,
        aliases: Mapping[str, Sequence[nn.Module]],
        sampling: Sampling,
        grad_scaler: torch.amp.GradScaler | None,
    ) -> None:
        self._model = model
        self._blocks = dict(blocks)
        self._sampling = sampling
        self._grad_scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
        self._armed: frozenset[str] = frozenset()
        self._seeds: Callable[[str], int] = lambda _: 0
        self._paused = 0
        self._generation = 0
        self._passes = PassLog()
        self._stated_examples: int | None = None
        self._examples_of_backward: dict[int, int | None] = {}
        self._scaler_cycle: object = None
        self._pending: dict[str, _Pending] = {}
        self.saw_forward = False
        self._handles = [
            model.register_forward_pre_hook(_uncompiled(self._before_forward), with_kwargs=True),
            model.register_forward_hook(_uncompiled(self._after_forward), always_call=True),
        ]
        for name, block in self._blocks.items():
            for module in (block.module, *aliases.get(name, ())):
                hook = _uncompiled(partial(self._after_layer, name, module))
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def arm(self, names: Collection[str], seeds: Callable[[str], int]) -> None:
        """Chooses the blocks to measure until the next `drain`.

        Args:
            names: The due blocks.
            seeds: Gives each block's seed for sub-sampling in this step, at most 63 bits.
        """
        self._armed = frozenset(names)
        self._seeds = seeds

    def state_examples(self, examples: int) -> None:
        """States how many terms the next captured backward's loss averages, instead of the batch dimension.

        Raises:
            ConfigError: `examples` is not a positive whole number.
        """
        try:
            count = 0 if isinstance(examples, bool) else operator.index(examples)
        except TypeError:
            count = 0
        if count < 1:
            raise ConfigError(f"examples is {examples!r}; the number of terms the loss averages, at least 1, is needed")
        self._stated_examples = count

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Captures nothing of the forwards made inside."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def drain(self) -> dict[str, BatchStatistics]:
        """Returns the batch statistics since the last call, scaled, and forgets them with every open forward."""
        backwards = max(len(self._examples_of_backward), 1)
        drained = {
            name: BatchStatistics(
                # Gamma is the mean over a block's positions, Omega their sum (algorithms.md 2.1).
                {"A": pending.A, "G": pending.G.mul_(backwards**2 * pending.examples / pending.rows)},
                pending.examples,
            )
            for name, pending in self._pending.items()
            if pending.rows
        }
        self._forget_everything()
        return drained

    def close(self) -> None:
        """Removes the hooks and drops what is pending."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._armed = frozenset()
        self._forget_everything()

    def _forget_everything(self) -> None:
        self._forget_backwards()
        self._passes.forget()
        self._generation += 1
        self._stated_examples = None

    def _forget_backwards(self) -> None:
        self._pending.clear()
        self._examples_of_backward.clear()

    # Forward ---------------------------------------------------------------------------------------------------------

    def _before_forward(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if module is not self._model:
            return
        self.saw_forward = True
        if self._armed:
            batch = next((each for each in _tensors((args, kwargs)) if each.dim()), None)
            self._passes.begin(examples=None if batch is None else batch.shape[0], captured=not self._paused)

    def _after_forward(self, module: nn.Module, _args: Sequence[Any], output: Any) -> None:
        if module is not self._model:
            return
        forward = self._passes.end()
        if forward is None or not (self._armed and forward.captured and module.training and torch.is_grad_enabled()):
            return
        # The first gradient of a backward arrives here, also where it then meets no armed layer.
        hook = partial(self._on_model_gradient, forward, self._generation)
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(hook)

    def _after_layer(
        self, name: str, own: nn.Module, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        if module is not own:
            return
        self.saw_forward = True
        if name not in self._armed or not module.training:
            return
        rerun_in = current_backward()
        outside = rerun_in == NO_BACKWARD
        nested = not outside and rerun_in not in self._examples_of_backward
        forward = self._passes.forward_of_call(captured=not self._paused, nested=nested)
        if not forward.captured or (outside and self._paused) or not torch.is_grad_enabled():
            return
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        activation = args[0] if args else kwargs.get("input")
        if not isinstance(activation, Tensor):
            raise KfdistError(f"layer {name!r} was called with {type(activation).__name__} as input, not a tensor")
        call = _Call(activation.detach(), _version(activation), forward, self._generation, rerun_in)
        output.register_hook(partial(self._on_output_gradient, name, call))

    # Backward --------------------------------------------------------------------------------------------------------

    def _on_model_gradient(self, forward: ForwardPass, generation: int, _gradient: Tensor) -> None:
        if generation == self._generation:
            whole_rerun = forward.outer_backward != NO_BACKWARD
            self._begin_backward(forward.outer_backward if whole_rerun else current_backward())

    def _on_output_gradient(self, name: str, call: _Call, output_gradient: Tensor) -> None:
        if call.generation != self._generation or name not in self._armed:
            return
        if call.version != _version(call.activation):
            raise KfdistError(
                f"the input of layer {name!r} was changed in place between its forward and its backward, so its "
                "statistics are lost (autocast had copied it, or torch itself would have refused); make that "
                "operation out of place"
            )
        backward = self._backward_of(call)
        self._begin_backward(backward)
        with torch.no_grad():
            self._add(name, call, output_gradient.detach(), backward)

    def _backward_of(self, call: _Call) -> int:
        """Returns the outermost running backward; those that checkpointing nests in it don't count."""
        running = current_backward()
        if call.rerun_in == NO_BACKWARD or running in self._examples_of_backward:
            return running
        if call.forward.whole and self._examples_of_backward:
            return next(reversed(self._examples_of_backward))
        return call.rerun_in

    def _begin_backward(self, backward: int) -> None:
        """Counts a backward once, and forgets those of an iteration that the scaler skipped without a step of ours."""
        if backward in self._examples_of_backward:
            return
        if self._grad_scaler is not None:
            # GradScaler.update() replaces this table: a new one here means that a whole iteration has passed.
            cycle = self._grad_scaler._per_optimizer_states
            if cycle is not self._scaler_cycle:
                self._forget_backwards()
            self._scaler_cycle = cycle
        self._examples_of_backward[backward] = self._stated_examples
        self._stated_examples = None

    def _add(self, name: str, call: _Call, output_gradient: Tensor, backward: int) -> None:
        block, pending = self._blocks[name], self._pending.get(name)
        # Seeds count the calls of this step alone, so that a resumed run draws what the uninterrupted one does.
        seed = (self._seeds(name) + (pending.calls if pending is not None else 0)) & _SEED_MASK
        stated = self._examples_of_backward[backward]
        own = call.forward.examples if stated is None else stated
        activation, output_gradient = block.batched(call.activation, output_gradient)
        examples = activation.shape[0] if own is None else own
        activation, output_gradient, boost = self._sampled(activation, output_gradient, seed ^ _EXAMPLES_SEED)
        sums = block.factor_sums(
            activation, output_gradient, positions_fraction=self._sampling.positions_fraction, seed=seed
        )
        A = sums.A if boost == 1.0 else sums.A.mul_(boost)
        G = sums.G.mul_(boost * float(examples) ** 2 * self._unscaling(sums.G))
        if pending is None:
            pending = self._pending[name] = _Pending(A, G)
        else:
            pending.A += A
            pending.G += G
        pending.rows += sums.rows * boost
        pending.calls += 1
        # Calls of one forward share its examples; a stated number holds for the whole backward.
        counted = (backward, call.forward if stated is None else None)
        if counted not in pending.counted:
            pending.counted.add(counted)
            pending.examples += examples

    def _unscaling(self, like: Tensor) -> Tensor | float:
        """Returns what divides the scaler's scale out of a product of two gradients, on the device."""
        if self._grad_scaler is None:
            return 1.0
        scale = self._grad_scaler._get_scale_async()
        if scale is None:
            raise KfdistError("the loss was not scaled by the GradScaler; call scaler.scale(loss).backward()")
        return scale.to(like.device, like.dtype) ** -2

    def _sampled(self, activation: Tensor, output_gradient: Tensor, seed: int) -> tuple[Tensor, Tensor, float]:
        """Picks the measured share of the examples; the last value makes sums over them unbiased."""
        n = activation.shape[0]
        kept = max(1, round(n * self._sampling.examples_fraction))
        if kept >= n:
            return activation, output_gradient, 1.0
        chosen = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:kept]
        chosen = chosen.to(activation.device, non_blocking=True)
        return activation[chosen], output_gradient[chosen], n / kept


def _uncompiled(hook: Callable[..., None]) -> Any:
    """Keeps torch.compile from tracing a hook: it depends on this step's state, and breaks the graph instead."""
    return torch.compiler.disable(hook)


def _version(tensor: Tensor) -> int | None:
    """Returns how often a tensor was changed in place; it shares that count with its detached views."""
    return None if tensor.is_inference() else tensor._version


def _tensors(value: Any) -> Iterator[Tensor]:
    """Walks the tensors of a model's inputs or outputs, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            yield from _tensors(getattr(value, each.name))
