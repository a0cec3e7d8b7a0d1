"""Forward and backward hooks that find the calls of the layers that are due, and hand them to the collector.

With the empirical Fisher a call is measured when the loss's backward reaches it. With `mc` and `exact` it is measured
by `Capture.observe`, from gradients of the model's own predictions, and the loss's backward counts for nothing.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kfdist import checks
from kfdist.capture.collect import Collector
from kfdist.capture.losses import OutputLoss
from kfdist.capture.observe import Observer, check_version
from kfdist.capture.passes import ForwardPass, PassLog, tensors_in
from kfdist.capture.requests import SEED_MASK, Request, Sampling, check_requests
from kfdist.capture.visits import Scaling, Unit, Visit
from kfdist.curvature.averages import BatchStatistics
from kfdist.curvature.blocks import Block
from kfdist.errors import ConfigError, KfdistError
from kfdist.torch_internals import NO_BACKWARD, changes_in_place, device_scale, running_backward, scaler_cycle
from kfdist.types import Fisher

_RANK_STRIDE = 0x5851F42D4C957F2D
"""Odd, so that no two ranks have the same seed."""


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

    With `mc` and `exact`, all of this holds of `observe`, which stands for the backward that measures.

    Args:
        model: The bare model (not its DDP wrapper); dim 0 of its first tensor input is the number of examples. Where a
            layer is called without calling the model as a whole, it is dim 0 of the layer's input.
        blocks: The blocks to measure, by name.
        aliases: Further modules tied to a block's parameters, by block name; their calls add to it.
        sampling: How much of a batch is measured.
        grad_scaler: The scaler whose scale is in the output gradients, or None.
        fisher: "empirical", "mc" or "exact".
        chains: Names of blocks in the order of their chains, for cross factors.
        coarse: Names of blocks in the order of their coarse groups.
        rank: Keeps the targets that ranks draw apart: equal draws would be as noisy as those of one rank alone.

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
        fisher: Fisher = "empirical",
        chains: Sequence[Sequence[str]] = (),
        coarse: Sequence[Sequence[str]] = (),
        rank: int = 0,
    ) -> None:
        self._model = model
        self._blocks = dict(blocks)
        self._fisher: Fisher = fisher
        self._groups = (chains, coarse)
        self._collector = Collector(self._blocks, sampling, chains=chains, coarse=coarse)
        self._observer = None if fisher == "empirical" else Observer(fisher, self._collector)
        self._grad_scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
        self._requests: Mapping[str, Request] = {}
        self._rank = rank
        self._paused = 0
        self._generation = 0
        self._passes = PassLog()
        self._stated_examples: int | None = None
        self._examples_of_backward: dict[int, int | None] = {}
        self._scaler_cycle: object = None
        self.saw_forward = False
        self._handles: list[RemovableHandle] = []
        if self._blocks:
            self._handles += [
                model.register_forward_pre_hook(_uncompiled(self._before_forward), with_kwargs=True),
                model.register_forward_hook(_uncompiled(self._after_forward), always_call=True),
            ]
        for name, block in self._blocks.items():
            for module in (block.module, *aliases.get(name, ())):
                hook = _uncompiled(partial(self._after_layer, name, module))
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def arm(self, requests: Mapping[str, Request]) -> None:
        """Says what to measure until the next `drain`.

        Args:
            requests: What is asked of each due block, by name; others cost nothing.

        Raises:
            ConfigError: It can't be measured.
        """
        chains, coarse = self._groups
        check_requests(requests, blocks=self._blocks, chains=chains, coarse=coarse, fisher=self._fisher)
        self._requests = dict(requests)
        self._collector.arm(self._requests)

    @property
    def scaled(self) -> bool:
        """Whether a GradScaler's scale is divided out of the output gradients."""
        return self._grad_scaler is not None

    def state_examples(self, examples: int) -> None:
        """States how many terms the next captured backward's loss averages, instead of the batch dimension.

        Raises:
            ConfigError: `examples` is not a positive whole number.
        """
        stated: object = examples
        if not isinstance(examples, bool):  # NumPy's integers count, True doesn't
            with suppress(TypeError):
                stated = operator.index(examples)
        self._stated_examples = checks.count("examples", stated, least=1, hint="the terms that the loss averages")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Captures nothing of the forwards made inside."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def observe(
        self,
        output: Tensor,
        loss: str,
        *,
        target: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
    ) -> None:
        """Measures the Fisher matrix of the model's own predictions, for "mc" and "exact"; not for "empirical".

        Call it between a forward and its backward, once for each head; contributions add up. Nothing happens on steps
        where nothing is due, and for forwards that aren't measured.

        Args:
            output: What the model gave (logits, for the cross-entropies), with its graph.
            loss: "cross_entropy", "mse" or "binary_cross_entropy" (with logits).
            target: As torch's loss takes it; needed for `ignore_index` and weights only.
            label_smoothing: As in torch.
            ignore_index: As in torch.
            reduction: "mean" or "sum", as in torch; the statistics are those of the Hessian of that loss.
            weight: As in torch.
            pos_weight: As in torch.

        Raises:
            ConfigError: A loss or arguments that aren't known, or a target that doesn't fit.
            KfdistError: Backward came first, or the graph can't be differentiated twice.
        """
        if self._observer is None or not self._requests:
            return
        described = OutputLoss(
            name=loss,
            target=target,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
            weight=weight,
            pos_weight=pos_weight,
        )
        if not isinstance(output, Tensor):
            raise ConfigError(f"output is a {type(output).__name__}; give the tensor that the loss is made of")
        if not output.requires_grad:
            return
        self._begin_cycle()
        with torch.no_grad():
            self._observer.run(
                output,
                described,
                stated=self._stated_examples,
                backwards=len(self._examples_of_backward),
                seed=(self._requests[min(self._requests)].seed + _RANK_STRIDE * self._rank) & SEED_MASK,
            )

    def drain(self) -> dict[str, BatchStatistics]:
        """Returns the batch statistics since the last call, scaled, and forgets them with every open forward.

        Raises:
            KfdistError: With "mc" or "exact": a block was due and its backward came, but nothing was observed.
        """
        try:
            if self._observer is None:
                return self._collector.drain(max(len(self._examples_of_backward), 1))
            self._observer.check_complete()
            return self._collector.drain(1)
        finally:
            self._forget_everything()

    def close(self) -> None:
        """Removes the hooks and drops what is pending."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._requests = {}
        self._forget_everything()

    def _forget_everything(self) -> None:
        self._forget_backwards()
        if self._observer is not None:
            self._observer.forget()
        self._passes.forget()
        self._generation += 1
        self._stated_examples = None

    def _forget_backwards(self) -> None:
        self._collector.forget()
        self._examples_of_backward.clear()

    # Forward ---------------------------------------------------------------------------------------------------------

    def _before_forward(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if module is not self._model:
            return
        self.saw_forward = True
        if self._requests:
            batch = next((each for each in tensors_in((args, kwargs)) if each.dim()), None)
            self._passes.begin(examples=None if batch is None else batch.shape[0], captured=not self._paused)

    def _after_forward(self, module: nn.Module, _args: Sequence[Any], output: Any) -> None:
        if module is not self._model:
            return
        forward = self._passes.end()
        if forward is None or not (self._requests and forward.captured and module.training and torch.is_grad_enabled()):
            return
        # The first gradient of a backward arrives here, also where it then meets no armed layer.
        hook = partial(self._on_model_gradient, forward, self._generation)
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(hook)

    def _after_layer(
        self, name: str, own: nn.Module, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        if module is not own:
            return
        self.saw_forward = True
        if name not in self._requests or not module.training:
            return
        rerun_in = running_backward()
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
        call = _Call(activation.detach(), changes_in_place(activation), forward, self._generation, rerun_in)
        if self._observer is None:
            output.register_hook(partial(self._on_output_gradient, name, call))
        elif outside:
            number = self._observer.remember(name, call.activation, call.version, forward, output)
            output.register_hook(partial(self._on_observed_backward, number, self._generation))
        elif not self._observer.running:
            self._observer.repeated(name)

    # Backward --------------------------------------------------------------------------------------------------------

    def _on_model_gradient(self, forward: ForwardPass, generation: int, _gradient: Tensor) -> None:
        if generation == self._generation and not self._observing:
            whole_rerun = forward.outer_backward != NO_BACKWARD
            self._begin_backward(forward.outer_backward if whole_rerun else running_backward())

    def _on_output_gradient(self, name: str, call: _Call, output_gradient: Tensor) -> None:
        if call.generation != self._generation or name not in self._requests:
            return
        check_version(name, call.activation, call.version)
        backward = self._backward_of(call)
        self._begin_backward(backward)
        visit = Visit(name, call.activation, Unit(backward, call.forward), self._examples_of_backward[backward])
        with torch.no_grad():
            self._collector.add(visit, output_gradient.detach(), Scaling(self._unscaling(), 2))

    def _on_observed_backward(self, number: int, generation: int, _gradient: Tensor) -> None:
        if generation == self._generation and self._observer is not None and not self._observing:
            self._begin_backward(running_backward())
            self._observer.let_go(number)

    @property
    def _observing(self) -> bool:
        return self._observer is not None and self._observer.running

    def _backward_of(self, call: _Call) -> int:
        """Returns the outermost running backward; those that checkpointing nests in it don't count."""
        running = running_backward()
        if call.rerun_in == NO_BACKWARD or running in self._examples_of_backward:
            return running
        if call.forward.whole and self._examples_of_backward:
            return next(reversed(self._examples_of_backward))
        return call.rerun_in

    def _begin_backward(self, backward: int) -> None:
        """Counts a backward once, and forgets those of an iteration that the scaler skipped, for which no step came."""
        if backward in self._examples_of_backward:
            return
        self._begin_cycle()
        self._examples_of_backward[backward] = self._stated_examples
        self._stated_examples = None

    def _begin_cycle(self) -> None:
        if self._grad_scaler is not None:
            # GradScaler.update() replaces this table: a new one here means that a whole iteration has passed.
            cycle = scaler_cycle(self._grad_scaler)
            if cycle is not self._scaler_cycle:
                self._forget_backwards()
            self._scaler_cycle = cycle

    def _unscaling(self) -> Tensor | float:
        """Returns what divides the scaler's scale out of a product of two gradients, on its device."""
        if self._grad_scaler is None:
            return 1.0
        scale = device_scale(self._grad_scaler)
        if scale is None:
            raise KfdistError("the loss was not scaled by the GradScaler; call scaler.scale(loss).backward()")
        return scale**-2


def _uncompiled(hook: Callable[..., None]) -> Any:
    """Keeps torch.compile from tracing a hook: it depends on this step's state, and breaks the graph instead."""
    return torch.compiler.disable(hook)
