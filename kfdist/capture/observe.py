"""Calls that wait for `Capture.observe`: the Fisher matrix of the model's own predictions is measured before backward.

The hooks remember where each armed layer's output is in the graph. `Observer.run` differentiates from the model's
output to those places and no further: no parameter's gradient is touched, and no hook of DistributedDataParallel fires.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from kfdist.capture.collect import Collector
from kfdist.capture.losses import OutputLoss, counted_terms, divisor, enumerated_roots, sampled_root
from kfdist.capture.micro_batches import MicroBatch
from kfdist.capture.passes import ForwardPass
from kfdist.capture.requests import SEED_MASK
from kfdist.capture.stated import Stated
from kfdist.capture.uses import Use
from kfdist.capture.visits import Scaling, Visit
from kfdist.errors import KfdistError
from kfdist.torch_internals import without_first_reduction
from kfdist.types import Fisher

_TARGETS_SEED = 0x2545F4914F6CDD1D
"""Keeps the draw of targets independent of other draws from the same seed."""


@dataclass
class _Open:
    """A use of a due block whose backward hasn't come yet."""

    use: Use
    output: GradientEdge
    visit: Visit | None = None


class Observer:
    """The open calls of one step, and what was observed of them.

    Args:
        fisher: "mc" or "exact".
        collector: Takes the statistics.

    Attributes:
        running: Whether it goes through the graph right now.
        is_ahead: Whether something was observed whose backward hasn't come yet.
    """

    def __init__(self, fisher: Fisher, collector: Collector) -> None:
        self._fisher = fisher
        self._collector = collector
        self._open: dict[int, _Open] = {}
        self._made = 0
        self._seen: set[str] = set()
        self._missed: set[str] = set()
        self._draws = 0
        self.running = False
        self.is_ahead = False

    def remember(self, use: Use, output: GradientEdge) -> int:
        """Notes a use of a block, and where its output is in the graph.

        Returns:
            Its number, for `let_go`; a hook may hold that, but not the edge, which holds the graph.
        """
        self._made += 1
        self._open[self._made] = _Open(use, output)
        self._seen.add(use.name)
        return self._made

    def repeated(self, name: str) -> None:
        """Notes that checkpointing ran a layer again.

        Raises:
            KfdistError: The first time it ran without gradients, so there was nothing to differentiate to.
        """
        if name not in self._seen:
            raise KfdistError(
                f"layer {name!r} is inside a reentrant activation checkpoint, and fisher={self._fisher!r} can't "
                "differentiate through that; use checkpoint(..., use_reentrant=False), or fisher='empirical'"
            )

    def backward_came(self, call: int, *, again: bool) -> None:
        """The backward of a call has come, before which it was to be observed; `again` if it keeps its graph."""
        self.is_ahead = False
        come = self._open.get(call)
        if come is None:
            return
        if come.visit is None:
            self._missed.add(come.use.name)
        if not again:
            del self._open[call]

    def run(
        self,
        output: Tensor,
        loss: OutputLoss,
        *,
        batch_of: Callable[[ForwardPass], MicroBatch],
        stated: Stated,
        seed: int,
    ) -> None:
        """Measures the open calls that the output depends on.

        Args:
            output: Of the model, or of one of its heads.
            loss: What is made of it.
            batch_of: The micro-batch of a forward.
            stated: What the user says of it.
            seed: Of the draw of targets.

        Raises:
            KfdistError: Backward came first, a layer's input was changed in place, or the graph can't be used twice.
        """
        calls = [call for call in self._open.values() if not call.use.part.elsewhere]
        if not calls:
            if self._missed:
                raise KfdistError(
                    f"observe() came after backward() (of layer {min(self._missed)!r}); call it between the forward "
                    "and its backward"
                )
            return
        for call in calls:
            call.use.check_unchanged()
        if not output.numel():
            roots: Iterable[Tensor] = [torch.zeros_like(output)]
        elif self._fisher == "mc":
            generator = torch.Generator(device="cpu").manual_seed(((seed ^ _TARGETS_SEED) + self._draws) & SEED_MASK)
            roots = [sampled_root(output, loss, generator)]
        else:
            roots = enumerated_roots(output, loss, _independent_examples(output, calls))
        self.is_ahead = True
        scaling = Scaling(1.0 / (divisor(output, loss) if output.numel() else 1.0), 1)
        stated = stated.completed(Stated(mask=counted_terms(output, loss), from_target=True))
        reached: Sequence[Tensor | None] | None = None
        if stated.mask is not None and self._fisher == "exact":  # one target of one term doesn't reach all rows
            generator = torch.Generator(device="cpu").manual_seed(0)
            reached = self._gradients(output, sampled_root(output, loss, generator), calls)
        for number, root in enumerate(roots):
            self._draws += 1
            gradients = self._gradients(output, root, calls)
            for place, (call, gradient) in enumerate(zip(calls, gradients, strict=True)):
                if gradient is None:
                    continue
                if call.visit is None:
                    call.visit = call.use.visit(batch_of(call.use.forward), stated)
                all_of_it = gradient if reached is None else reached[place]
                tells = call.use.share(all_of_it) if all_of_it is not None and number == 0 else None
                self._collector.add(call.visit, call.use.share(gradient), scaling, self._draws, tells=tells)

    def check_complete(self) -> None:
        """Checks that every block whose gradient came was observed.

        Raises:
            KfdistError: One wasn't.
        """
        missed = sorted(name for name in self._missed if name not in self._collector)
        if missed:
            raise KfdistError(
                f"layer {missed[0]!r} was due, but nothing was observed before its backward; with "
                f"fisher={self._fisher!r} call preconditioner.observe(output, loss) between forward and backward, once "
                "for each head, or use fisher='empirical'"
            )

    def discard(self) -> None:
        """What was observed counts for nothing; what is open may be observed anew."""
        self._missed.clear()
        for call in self._open.values():
            call.visit = None

    def forget(self) -> None:
        """Starts afresh."""
        self._open.clear()
        self._seen.clear()
        self._missed.clear()
        self._draws = 0
        self.is_ahead = False

    def _gradients(self, output: Tensor, root: Tensor, calls: list[_Open]) -> tuple[Tensor | None, ...]:
        self.running = True
        try:
            with without_first_reduction(output):
                return torch.autograd.grad(
                    output, [call.output for call in calls], grad_outputs=root, retain_graph=True, allow_unused=True
                )
        except RuntimeError as error:
            if "donated buffer" in str(error):
                raise KfdistError(
                    f"the compiled backward can run once only, but fisher={self._fisher!r} runs it before the loss "
                    "does; set torch._functorch.config.donated_buffer = False before the model is compiled"
                ) from error
            if "use_reentrant" in str(error):
                raise KfdistError(
                    f"fisher={self._fisher!r} can't differentiate through reentrant activation checkpoints; use "
                    "checkpoint(..., use_reentrant=False), or fisher='empirical'"
                ) from error
            raise
        finally:
            self.running = False


def _independent_examples(output: Tensor, calls: list[_Open]) -> int:
    """Returns how many examples share the output's dim 0: those of its forward, where they divide it."""
    length = output.shape[0] if output.dim() else 1
    turned = any(call.use.forward.is_turned(output.shape) for call in calls)
    known = {call.use.forward.examples for call in calls} - {None, 0}
    if not turned and (length in known or not known):
        return length
    fitting = [n for n in known if n is not None and length % n == 0 and not turned]
    if not fitting:
        raise KfdistError(
            f"the output has {length} entries along dim 0 for {sorted(n for n in known if n)} examples, so "
            "fisher='exact' can't tell which of them belong together; observe an output with the examples first, "
            "or use fisher='mc'"
        )
    return max(fitting)
