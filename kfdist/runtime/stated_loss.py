"""What users say of a loss that goes through the model, and which of its forwards and backwards count."""

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from kfdist.errors import ConfigError
from kfdist.runtime.assembly import Assembly


class StatedLoss:
    """The part of a `kfdist.Preconditioner` that speaks to its capture."""

    _assembly: Assembly

    def observe(self, output: Tensor, loss: str = "cross_entropy", **details: Any) -> None:
        """Says what the loss makes of a head's output, before its backward; for fisher="mc" and "exact".

        Free on steps that measure nothing. With several heads, call it once for each.

        Args:
            output: The model's output that the loss takes: logits, or predictions for "mse".
            loss: "cross_entropy", "mse" or "binary_cross_entropy" (with logits).
            **details: What else the loss was given: `target` (where `ignore_index` leaves terms out), `reduction`,
                `label_smoothing`, `ignore_index`, `pos_weight`; see `kfdist.capture.capture.Capture.observe`.

        Raises:
            ConfigError: An unknown loss or detail, or an output that doesn't belong to the last forward.
        """
        self._assembly.pipeline.capture.observe(output, loss, **details)

    def batch(self, *, examples: int | None = None, mask: Tensor | None = None) -> None:
        """States what the next backward's loss is a mean of, where it isn't dim 0 of the input.

        It holds for one backward: call it for each micro-batch.

        Args:
            examples: N, how many terms the loss averages: the tokens of a loss per token, say. With k micro-batches
                whose losses are sums over all M of their tokens, it is M / k. A device tensor would be read, which
                waits for it.
            mask: Which positions the loss counts, `[N, T]` like the first two dimensions of the layers' inputs, True or
                1 for those that count. What it leaves out, and no gradient comes to, leaves A, G and their numbers.
                Layers with other positions (behind pooling, convolutions) aren't masked; `coverage()` says so, and how
                much was left out. Not needed where `observe` is given the loss's target.

        Raises:
            ConfigError: `examples` is not a positive whole number, the mask has other dimensions or values, or neither
                is given.
        """
        if examples is None and mask is None:
            raise ConfigError("batch() was told nothing; give examples, the terms that the loss averages, or mask")
        if examples is not None:
            self._assembly.pipeline.capture.state_examples(examples)
        if mask is not None:
            self._assembly.pipeline.capture.state_mask(mask)

    def discard(self) -> None:
        """Forgets what was measured since the last `step`, where its gradients were dropped and no step follows.

        `zero_grad` is noticed by itself, at the next backward. Call this where gradients are dropped in part only,
        moved out of `.grad` or zeroed through `.data`; and with "mc" or "exact" where `zero_grad` comes after the next
        `observe`. Where all gradients are changed in place between two backwards of one step (clipped, or zeroed with
        `set_to_none=False`), the second reads whether they are zero, and waits for the device to do so.
        """
        self._assembly.pipeline.capture.discard()

    def paused(self) -> AbstractContextManager[None]:
        """Captures nothing of forwards made inside the `with` block."""
        return self._assembly.pipeline.capture.paused()
