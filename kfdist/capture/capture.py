"""Finds the uses of the blocks that are due, in forward and backward, and hands them to the collector.

With the empirical Fisher a call is measured when the loss's backward reaches it. With `mc` and `exact` it is measured
by `Capture.observe`, from gradients of the model's own predictions, and the loss's backward counts for nothing.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from kfdist.capture.affine import Affine, Columns
from kfdist.capture.biases import Biases
from kfdist.capture.collect import Collector
from kfdist.capture.gradient_norms import GradientNorms
from kfdist.capture.layouts import layouts_of
from kfdist.capture.loss_scale import LossScale
from kfdist.capture.losses import OutputLoss
from kfdist.capture.masks import MaskedRows, checked_mask
from kfdist.capture.micro_batches import MicroBatches, makes_gradients
from kfdist.capture.observe import Observer
from kfdist.capture.operations import Product
from kfdist.capture.passes import ForwardPass, PassLog, Paused, tensors_in
from kfdist.capture.registry import Part
from kfdist.capture.requests import SEED_MASK, Request, Sampling, check_requests
from kfdist.capture.saved_inputs import let_go_after, tell_when_there
from kfdist.capture.stated import Stated, checked_examples
from kfdist.capture.unmeasured import Unmeasured
from kfdist.capture.uses import Held, Use, uses_of_affine, uses_of_product
from kfdist.capture.visits import Scaling
from kfdist.capture.watch import Watch
from kfdist.curvature.averages import BatchStatistics
from kfdist.curvature.blocks import Block
from kfdist.errors import ConfigError
from kfdist.linalg.arithmetic import plain_arithmetic
from kfdist.torch_internals import (
    NO_BACKWARD,
    keeps_graph,
    oddity,
    running_backward,
)
from kfdist.types import Fisher

_RANK_STRIDE = 0x5851F42D4C957F2D
"""Odd, so that no two ranks have the same seed."""


class Capture:
    """Collects the statistics of the blocks that are due, between two steps.

    A block is measured when its layer runs in training mode with gradients on, the block is armed and capture is not
    paused, and a backward follows before the next step. Backwards are micro-batches, whose losses the caller divided by
    their number; those of one forward are one, and add their output gradients; those whose gradients are gone by the
    next one (`zero_grad`) count for nothing. Forwards before one backward are more positions of the same examples: a
    term of the loss goes through all of them, or the loss is the sum of their means. Between a forward and its backward
    the inputs of armed layers are referenced, not copied; those that somebody's hooks save, as in non-reentrant
    checkpoints, are read when these give them back (`kfdist.capture.saved_inputs`). After a backward that keeps its
    graph, its output gradients are, too.

    `torch.autograd.grad` through a captured forward counts for nothing, since it makes no gradients. Where it creates a
    graph for the loss (a gradient penalty), that part of the loss isn't measured, and `unmeasured` says so. Copies of
    the model have copies of these hooks, which do nothing.

    With `mc` and `exact`, all of this holds of `observe`, which stands for the backward that measures.

    Args:
        model: The bare model (not its DDP wrapper); dim 0 of its first tensor input is the number of examples. Where
            modules inside are called without calling the model as a whole, it is that of the outermost one's.
        blocks: The blocks to measure, by name. All uses of a block's weight add up, wherever they are.
        sampling: How much of a batch is measured.
        grad_scaler: The scaler whose scale is in the output gradients, or None.
        fisher: "empirical", "mc" or "exact".
        chains: Names of blocks in the order of their chains, for cross factors.
        coarse: Names of blocks in the order of their coarse groups.
        rank: Keeps the targets that ranks draw apart: equal draws would be as noisy as those of one rank alone.

    Attributes:
        biases: Those that blocks were planned with; whoever asks all ranks settles which of them stay.
        norms: Those of the micro-batches' gradients, until the next drain.
        masked: What masks left out before the last drain.
        multiplied: The parameters, by id, that were seen to go into a product with an input, with a block or without.
        doubts: Why the examples of forwards before it, where none were stated, may be other ones than were counted.
        micro_batches: How many backwards before it counted; 0 where nobody watched.
        zero_rows: By block without a mask, with positions or no stated number of examples: how many output gradients
            before it are zero, of all.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, Block],
        *,
        sampling: Sampling,
        grad_scaler: torch.amp.GradScaler | None,
        fisher: Fisher = "empirical",
        chains: Sequence[Sequence[str]] = (),
        coarse: Sequence[Sequence[str]] = (),
        rank: int = 0,
    ) -> None:
        self._itself: weakref.ref[Capture] = weakref.ref(self)
        self._blocks = dict(blocks)
        self._fisher: Fisher = fisher
        self._groups = (chains, coarse)
        self._layouts = layouts_of(model, self._blocks.values())
        self._collector = Collector(self._blocks, sampling, chains=chains, coarse=coarse, layouts=self._layouts)
        self._observer = None if fisher == "empirical" else Observer(fisher, self._collector)
        self._loss_scale = LossScale(grad_scaler)
        self._requests: Mapping[str, Request] = {}
        self._rank = rank
        self._paused = Paused()
        self._generation = 0
        self._passes = PassLog()
        self._batches = MicroBatches()
        self.norms = GradientNorms(list(model.parameters()), self._batches, self._loss_scale)
        self._stated = Stated()
        self._held: dict[Use, Held] = {}
        self._looks = False
        self.doubts: Sequence[str] = ()
        self.micro_batches = 0
        self.zero_rows: Mapping[str, tuple[Tensor, int]] = {}
        self._watch = Watch(model, self._blocks.values(), self)
        self.multiplied = self._watch.uses.multiplied
        self.masked = MaskedRows()
        self._rests = False
        self.biases = Biases(self._blocks.values(), self._watch.uses)
        self._not_whole = Unmeasured(self._blocks, self._watch.uses, self.biases)

    def arm(self, requests: Mapping[str, Request], *, norms: bool = False) -> None:
        """Says what to measure until the next `drain`.

        Args:
            requests: What is asked of each due block, by name; others cost nothing.
            norms: Whether to take the norms of the gradients of all parameters, too.

        Raises:
            ConfigError: It can't be measured.
        """
        if self._rests and not (requests or norms or self._looks):
            return
        if self._rests:
            self._forget_everything()  # what went by unwatched
            self._rests = False
        chains, coarse = self._groups
        check_requests(requests, blocks=self._blocks, chains=chains, coarse=coarse, fisher=self._fisher)
        self._requests = dict(requests)
        self._collector.arm(self._requests)
        if norms:
            self.norms.start()
        else:
            self.norms.stop()
        if self._requests or self._looks or norms:
            self._watch.start(self._requests or (self._blocks if self._looks else ()))
        else:
            self._watch.stop()

    def look(self) -> None:
        """Watches the next forward also if nothing is due: a run that goes on must know which biases are left out."""
        self._looks = True

    @property
    def rests(self) -> bool:
        """Whether nothing was watched before the last drain, and nothing has been armed since: there is nothing new."""
        return self._rests

    @property
    def scaled(self) -> bool:
        """Whether a GradScaler's scale is divided out of the output gradients."""
        return self._loss_scale.is_on

    def state_examples(self, examples: int) -> None:
        """States how many terms the next captured backward's loss averages, instead of the batch dimension.

        Raises:
            ConfigError: `examples` is not a positive whole number.
        """
        self._stated = replace(self._stated, examples=checked_examples(examples))

    def state_mask(self, mask: Tensor) -> None:
        """States which positions the next captured backward's loss counts; see `kfdist.capture.masks`.

        Raises:
            ConfigError: It is no mask `[N, T]`.
        """
        given, strange = checked_mask(mask)
        self._stated = replace(self._stated, mask=given, strange=strange)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Captures nothing of the forwards made inside, in this thread."""
        self._paused.depth += 1
        try:
            yield
        finally:
            self._paused.depth -= 1

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
        self._forget_dropped()
        with plain_arithmetic(output.device):
            self._observer.run(
                output,
                described,
                batch_of=self._batches.of_forward,
                stated=self._stated,
                seed=(self._requests[min(self._requests)].seed + _RANK_STRIDE * self._rank) & SEED_MASK,
            )

    def drain(self) -> dict[str, BatchStatistics]:
        """Returns the batch statistics since the last call, scaled, and forgets them with every open forward.

        Raises:
            KfdistError: With "mc" or "exact": a block was due and its backward came, but nothing was observed.
        """
        self.micro_batches = len(self._batches)
        if self._rests:
            self._stated = Stated()
            return {}
        watched = bool(self._requests or self._looks or self.norms.watched)
        try:
            if self._observer is not None:
                self._observer.check_complete()
            for use, held in self._held.items():
                self._measure(use, held)
            self.doubts = [each.doubt for each in self._batches.unstated() if each.doubt]
            repeats = 1 if self._observer is not None else max(len(self._batches), 1)
            self.zero_rows = {} if self._fisher == "exact" else self._collector.zero_rows.counts
            self.masked = self._collector.masked
            for name, use in self._collector.indivisible.items():
                self._watch.uses.unhandled[name, False].add(use)
            empty = frozenset(self._collector.empty)
            drained = self._collector.drain(repeats)
        finally:
            self._forget_everything()
            self._watch.reset()
        self._looks = self._looks and not self._watch.looked
        self._not_whole.note(self._requests, drained.keys(), empty)
        self._rests = not (watched or self._looks)
        return drained

    @property
    def unmeasured(self) -> Mapping[str, str]:
        """The blocks that had a gradient when they were last due, but not all in their statistics, and why.

        A use that can't be measured is remembered: it was seen when every module was watched.
        """
        return self._not_whole.reasons

    @property
    def unseen(self) -> Set[str]:
        """The blocks among `unmeasured` of which there are no statistics at all."""
        return self._not_whole.unseen

    def discard(self) -> None:
        """Forgets the backwards since the last `drain`, as those whose gradients are gone are forgotten."""
        self._collector.forget()
        if self._observer is not None:
            self._observer.discard()
        self._batches.forget()
        self.norms.forget()
        self._held.clear()

    def close(self) -> None:
        """Stops watching and drops what is pending."""
        self._watch.stop()
        self.norms.stop()
        self._requests = {}
        self._forget_everything()

    def _forget_everything(self) -> None:
        self.discard()
        if self._observer is not None:
            self._observer.forget()
        self._passes.forget()
        self._generation += 1
        self._stated = Stated()

    # Forward ---------------------------------------------------------------------------------------------------------

    @property
    def pauses(self) -> bool:
        """Whether this thread is inside `paused`; what checkpointing repeats is its first forward's, paused or not."""
        return bool(self._paused.depth) and running_backward() == NO_BACKWARD

    def begin_calls(self) -> None:
        """A module is called from outside of the model (`kfdist.capture.seen_uses.Observed`)."""
        self._passes.begin_calls()

    def begin_forward(self, *, whole: bool) -> None:
        """The model is called as a whole, or a module inside without it."""
        self._passes.begin(captured=not self._paused.depth, whole=whole)

    def end_call(self, inputs: Any, *, turned: bool) -> None:
        """A module's call has ended."""
        self._passes.called(inputs, turned=turned)

    def end_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """That call has ended."""
        forward = self._passes.end(inputs, output)
        if forward is None or not forward.whole:
            return
        if not (forward.captured and module.training and torch.is_grad_enabled()):
            return
        if not any(parameter.requires_grad for parameter in self._parameters()):
            return
        # The first gradient of a backward arrives here, also where it then meets no armed layer.
        hook = partial(_tell, self._itself, Capture._on_model_gradient, forward, self._generation)
        for tensor in tensors_in(output):
            if tensor.requires_grad and not oddity(tensor):
                tensor.register_hook(hook)

    def product(self, parts: Sequence[Part], product: Product, output: Tensor, *, training: bool) -> None:
        """Weights of blocks were used."""
        parts = [part for part in parts if part.block in self._requests]
        if not product.weight.requires_grad:  # frozen for now, as a discriminator in the generator's turn
            return
        forward = self._forward_of_use({part.block for part in parts}, training=training)
        if forward is None:
            return
        forward.measured = True
        forward.inputs.add((product.activation.dim(), len(product.activation)))  # of code without modules
        saved = None if self._observer else self._watch.uses.forward.saved  # what is observed is measured before
        uses, edge = uses_of_product(parts, product, output, forward, self._generation, saved)
        for use in uses:
            self._collector.check_input(use.name, product.activation.mT if product.from_left else product.activation)
            self._expect(use, edge)
        let_go_after(edge.node, [use.activation for use in uses])

    def affine(self, columns: Sequence[Columns], use: Affine, output: Tensor, *, training: bool) -> None:
        """Scales or shifts of blocks were used."""
        given = [each for each in (use.scale, use.shift) if each is not None]
        if not any(each.requires_grad for each in given):
            return
        columns = [each for each in columns if each.block in self._requests]
        forward = self._forward_of_use({each.block for each in columns}, training=training)
        if forward is None:
            return
        uses, edge = uses_of_affine(columns, use, output, forward, self._generation, inside=self._layouts.keys())
        for each in uses:
            self._expect(each, edge)

    def _forward_of_use(self, names: Set[str], *, training: bool) -> ForwardPass | None:
        """Returns the forward that a use of blocks belongs to, as it goes on; None where it isn't measured."""
        if not training and torch.is_grad_enabled() and not self._paused.depth:
            self._not_whole.in_eval_mode |= names
        if not training or not names:
            return None
        rerun_in = running_backward()
        outside = rerun_in == NO_BACKWARD
        nested = not outside and rerun_in not in self._batches
        forward = self._passes.forward_of_call(captured=not self._paused.depth, nested=nested)
        if not forward.captured or (outside and self._paused.depth) or not torch.is_grad_enabled():
            return None
        return forward

    def _expect(self, use: Use, edge: GradientEdge) -> None:
        """Waits for the gradient of a use's output."""
        if self._observer is None:
            told = partial(_tell, self._itself, Capture._on_output_gradient, use, edge.output_nr)
            tell_when_there(edge.node, use.activation, told)
        elif use.rerun_in == NO_BACKWARD:
            number = self._observer.remember(use, edge)
            of_it = (number, use.forward, self._generation)
            edge.node.register_prehook(partial(_tell, self._itself, Capture._on_observed_backward, *of_it))
        elif not self._observer.running:
            self._observer.repeated(use.name)

    # Backward --------------------------------------------------------------------------------------------------------

    def _on_model_gradient(self, forward: ForwardPass, generation: int, _gradient: Tensor) -> None:
        if generation == self._generation and not self._observing and self._accumulates():
            whole_rerun = forward.outer_backward != NO_BACKWARD
            self._begin_backward(forward.outer_backward if whole_rerun else running_backward(), forward)

    def _on_output_gradient(self, use: Use, output_number: int, gradients: tuple[Tensor | None, ...]) -> None:
        gradient = None if use.part.elsewhere else gradients[output_number]
        if gradient is None or use.generation != self._generation or use.name not in self._requests:
            return
        if not self._accumulates(use.name) or not use.is_there:
            return
        use.check_unchanged()
        self._begin_backward(self._backward_of(use), use.forward)
        with plain_arithmetic(gradient.device):
            share, held = use.share(gradient), self._held.pop(use, None)
            held = Held(share if held is None else held.gradient + share, Scaling(self._loss_scale.of_products(), 2))
            if keeps_graph():
                self._held[use] = held
            else:
                self._measure(use, held)

    def _accumulates(self, name: str | None = None) -> bool:
        """Whether the running backward makes gradients, of a block or of any; if not, a graph may be for the loss."""
        blocks = self._blocks.values() if name is None else [self._blocks[name]]
        found = makes_gradients((each for block in blocks for each in block.parameters()), of_any=name is None)
        if not found and name is not None and torch.is_grad_enabled():
            self._watch.uses.unhandled[name, False].add("torch.autograd.grad with create_graph")
        return found

    def _measure(self, use: Use, held: "Held") -> None:
        """Measures a use with the gradients that all backwards of its forward have made for it together."""
        use.check_unchanged()
        batch = self._batches.of_forward(use.forward)
        self._collector.add(use.visit(batch, batch.stated), held.gradient, held.scaling, tells=held.gradient)

    def _on_observed_backward(
        self, number: int, forward: ForwardPass, generation: int, _gradients: tuple[Tensor | None, ...]
    ) -> None:
        if generation == self._generation and self._observer and not self._observing and self._accumulates():
            self._begin_backward(running_backward(), forward)
            self._observer.backward_came(number, again=keeps_graph())

    @property
    def _observing(self) -> bool:
        return self._observer is not None and self._observer.running

    def _backward_of(self, use: Use) -> int:
        """Returns the outermost running backward; those that checkpointing nests in it don't count."""
        running = running_backward()
        if use.rerun_in == NO_BACKWARD or running in self._batches:
            return running
        if use.forward.whole and len(self._batches):
            return self._batches.latest_backward
        return use.rerun_in

    def _begin_backward(self, backward: int, forward: ForwardPass) -> None:
        """Counts a backward once, after forgetting those before it that count for nothing."""
        if backward not in self._batches:
            if self._observer is None or not self._observer.is_ahead:
                self._forget_dropped()
            self._batches.begin(backward, self._stated, self._parameters())
            self._stated = Stated()
        self._batches.reach(backward, forward)

    def _parameters(self) -> Sequence[Tensor]:
        of_blocks = [each for name in self._requests for each in self._blocks[name].parameters()]
        return of_blocks or self.norms.watched

    def _forget_dropped(self) -> None:
        """Forgets backwards whose gradients are gone, or of an iteration that the scaler skipped."""
        dropped, moved_on = self._batches.dropped(self._parameters()), self._loss_scale.moved_on()
        if dropped or moved_on:
            self.discard()


def _tell(capture: weakref.ref[Capture], hook: Callable[..., None], *arguments: Any) -> None:
    """Calls a hook of the graph, unless nobody has the capture any more.

    The graph's hooks must not hold it: what is observed holds the graph, and no collector looks into autograd's nodes.
    """
    if (found := capture()) is not None:
        hook(found, *arguments)
