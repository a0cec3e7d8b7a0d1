"""Forward and backward hooks that collect each due block's batch statistics; nothing else.

Scaling (algorithms.md 0.2): the loss is a mean over N examples, so autograd's output gradient is g/N and with k
backwards
of loss/k it is g/(N k); under a GradScaler it is also multiplied by the scale. N is undone at each backward, k once its
final value is known, at the step. A sum is kept per block, never the rows.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kfdist.curvature.blocks import Block
from kfdist.curvature.estimate import BatchStatistics
from kfdist.errors import ConfigError, KfdistError


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
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; a number in (0, 1] is needed")


@dataclass
class _Pending:
    """One block's sums since the last step."""

    A: Tensor
    G: Tensor
    rows: float = 0.0
    examples: float = 0.0
    forwards: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class _Forward:
    """What a hook has to remember of a forward until its backward."""

    generation: int
    number: int
    examples: int
    outer_backward: int


class Capture:
    """Collects the statistics of the blocks that are due, between two steps.

    A block is measured when its layer runs in training mode with gradients on, the block is armed and capture is not
    paused, and a backward follows before the next step. Several forwards before one backward add up. Only references to
    the layer's input are kept in between, and only for armed blocks.

    Args:
        model: The bare model (not its DDP wrapper); dim 0 of its first tensor input is the number of examples.
        blocks: The blocks to measure, by name.
        aliases: Further modules tied to a block's parameters, by block name; their calls add to it.
        sampling: How much of a batch is measured.
        grad_scaler: The scaler whose scale is in the output gradients, or None.
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
        self._blocks = dict(blocks)
        self._sampling = sampling
        self._grad_scaler = grad_scaler
        self._armed: frozenset[str] = frozenset()
        self._seeds: Callable[[str], int] = lambda _: 0
        self._paused = 0
        self._generation = 0
        self._forwards = 0
        self._examples: int | None = None
        self._stated_examples: int | None = None
        self._examples_of_backward: dict[int, int | None] = {}
        self._scaler_cycle: object = None
        self._pending: dict[str, _Pending] = {}
        before: Any = torch.compiler.disable(self._before_forward)
        self._handles = [model.register_forward_pre_hook(before, with_kwargs=True)]
        for name, block in self._blocks.items():
            hook: Any = torch.compiler.disable(partial(self._after_layer, name))
            for module in (block.module, *aliases.get(name, ())):
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def arm(self, names: Collection[str], seeds: Callable[[str], int]) -> None:
        """Chooses the blocks to measure until the next `drain`.

        Args:
            names: The due blocks.
            seeds: Gives each block's seed for sub-sampling in this step.
        """
        self._armed = frozenset(names)
        self._seeds = seeds

    def state_examples(self, examples: int) -> None:
        """States how many terms the next backward's loss averages, instead of the batch dimension.

        Raises:
            ConfigError: `examples` is not a positive whole number.
        """
        if not isinstance(examples, int) or isinstance(examples, bool) or examples < 1:
            raise ConfigError(f"examples is {examples!r}; the number of terms the loss averages, at least 1, is needed")
        self._stated_examples = examples

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
                pending.A,
                # Gamma is the mean over a block's positions, Omega their sum (algorithms.md 2.1).
                pending.G * (backwards**2 * pending.examples / pending.rows),
                pending.examples,
            )
            for name, pending in self._pending.items()
            if pending.rows
        }
        self._forget()
        self._generation += 1
        self._stated_examples = None
        return drained

    def close(self) -> None:
        """Removes the hooks and drops what is pending."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def _forget(self) -> None:
        self._pending.clear()
        self._examples_of_backward.clear()

    def _before_forward(self, _module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._forwards += 1
        tensor = _first_tensor((args, dict(kwargs)))
        self._examples = tensor.shape[0] if tensor is not None and tensor.dim() else None

    def _after_layer(
        self, name: str, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        if name not in self._armed or self._paused or not module.training or not torch.is_grad_enabled():
            return
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        activation = args[0] if args else kwargs.get("input")
        if not isinstance(activation, Tensor):
            raise KfdistError(f"layer {name!r} was called with {type(activation).__name__} as input, not a tensor")
        examples = self._examples if self._examples is not None else activation.shape[0]
        forward = _Forward(self._generation, self._forwards, examples, torch._C._current_graph_task_id())
        output.register_hook(partial(self._on_output_gradient, name, activation.detach(), forward))

    def _on_output_gradient(self, name: str, activation: Tensor, forward: _Forward, output_gradient: Tensor) -> None:
        if forward.generation != self._generation or name not in self._armed:
            return
        # A forward re-run by reentrant checkpointing belongs to the backward that re-runs it.
        own_task = torch._C._current_graph_task_id()
        backward = forward.outer_backward if forward.outer_backward != -1 else own_task
        self._begin_backward(backward)
        stated = self._examples_of_backward[backward]
        with torch.no_grad():
            self._add(name, activation, output_gradient.detach(), forward, backward, stated)

    def _begin_backward(self, backward: int) -> None:
        """Counts a backward once, and forgets those of an iteration that the scaler skipped without a step of ours."""
        if backward in self._examples_of_backward:
            return
        if self._grad_scaler is not None:
            # GradScaler.update() replaces this table: a new one here means that a whole iteration has passed.
            cycle = self._grad_scaler._per_optimizer_states
            if cycle is not self._scaler_cycle:
                self._forget()
            self._scaler_cycle = cycle
        self._examples_of_backward[backward] = self._stated_examples
        self._stated_examples = None

    def _add(
        self,
        name: str,
        activation: Tensor,
        output_gradient: Tensor,
        forward: _Forward,
        backward: int,
        stated_examples: int | None,
    ) -> None:
        block = self._blocks[name]
        seed = self._seeds(name)
        examples = forward.examples if stated_examples is None else stated_examples
        activation, output_gradient, boost = self._sampled(activation, output_gradient, seed + forward.number)
        sums = block.factor_sums(
            activation,
            output_gradient,
            positions_fraction=self._sampling.positions_fraction,
            seed=seed + forward.number,
        )
        factor: Tensor | float = boost * float(examples) ** 2
        if self._grad_scaler is not None and self._grad_scaler.is_enabled():
            scale = self._grad_scaler._get_scale_async()
            if scale is None:
                raise KfdistError("the loss was not scaled by the GradScaler; call scaler.scale(loss).backward()")
            factor = factor / scale.to(sums.G.device, sums.G.dtype) ** 2
        pending = self._pending.get(name)
        if pending is None:
            pending = self._pending[name] = _Pending(torch.zeros_like(sums.A), torch.zeros_like(sums.G))
        pending.A += sums.A * boost
        pending.G += sums.G * factor
        pending.rows += sums.rows * boost
        # Calls of one forward share its examples; a stated number holds for the whole backward.
        counted = backward if stated_examples is not None else -1 - forward.number
        if counted not in pending.forwards:
            pending.forwards.add(counted)
            pending.examples += examples

    def _sampled(self, activation: Tensor, output_gradient: Tensor, seed: int) -> tuple[Tensor, Tensor, float]:
        """Picks the measured share of the examples; the last value makes sums over them unbiased."""
        n = activation.shape[0]
        kept = max(1, round(n * self._sampling.examples_fraction))
        if kept == n:
            return activation, output_gradient, 1.0
        chosen = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:kept].to(activation.device)
        return activation[chosen], output_gradient[chosen], n / kept


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            found = _first_tensor(item)
            if found is not None:
                return found
    return None
