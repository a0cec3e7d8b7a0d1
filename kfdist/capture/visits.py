"""One call of a layer as it is measured: which examples it saw, and what undoes the scale of its output gradient.

A loss that is a mean over N examples gives output gradients g/N, where g is the gradient of the per-example loss; under
a GradScaler they are also multiplied by its scale. `Scaling` undoes both.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kfdist.capture.micro_batches import MicroBatch
from kfdist.capture.passes import ForwardPass
from kfdist.capture.stated import Stated
from kfdist.curvature.blocks.experts import Reach


@dataclass(frozen=True)
class Unit:
    """The calls that saw the same examples one by one: those of one forward.

    Attributes:
        batch: Its micro-batch.
        forward: The forward.
    """

    batch: MicroBatch
    forward: ForwardPass

    @property
    def whole(self) -> MicroBatch | ForwardPass:
        """What layers of one forward share also where they are called one by one."""
        return self.forward if self.forward.whole else self.batch


@dataclass(eq=False)
class Visit:
    """One call of a layer, with the backwards through it, which count its input once.

    Attributes:
        name: The block.
        activation: What the layer was given.
        unit: Whose examples it saw.
        stated: What the user says of its micro-batch.
        biased: Whether the block's bias was added.
        reach: Which row met which expert, of a block of experts.
        alone: Whether its output is made of parameters alone, and is the same for all examples.
        number: Which call of the block it is in this step; negative until it is first measured.
        kept: The rows of its input that are measured already, `[N, T]`; None without a mask of them.
        of_units: Of a block of units, makes the gradients `[n, c, k]` of all entries of an output's gradient, or of
            those that are `chosen`.
    """

    name: str
    activation: Tensor
    unit: Unit
    stated: Stated
    biased: bool = True
    reach: Reach | None = None
    alone: bool = False
    number: int = -1
    kept: Tensor | None = None
    of_units: Callable[..., Tensor] | None = None

    @property
    def for_all(self) -> bool:
        """Whether its gradient is a sum over several examples, as far as it is known.

        Not where the model was given none, nor where it has as many rows as terms are stated that the loss averages.
        """
        rows = len(self.activation) if self.activation.dim() else 1
        return self.alone and (self.unit.forward.examples or 1) > 1 and self.stated.examples != rows

    @property
    def counted(self) -> MicroBatch:
        """Calls that are equal in this share their examples: a term of the loss may go through several forwards."""
        return self.unit.batch

    def examples(self, length: int) -> int:
        """Returns N of an input whose dim 0 is `length`."""
        forward = self.unit.forward
        known = (self.stated.examples, forward.examples, forward.outputs)
        return next((each for each in known if each is not None), length)

    def grouped(self, length: int) -> int:
        """Returns how many examples share dim 0, one after another; the dimension itself where they don't fill it."""
        n = self.unit.forward.examples
        return n if n and length % n == 0 else length


@dataclass(frozen=True)
class Scaling:
    """What output gradients are multiplied by, given as what their products are multiplied by.

    Attributes:
        square: Of products, besides the number of examples: 1 over the squared scale of the loss.
        power: Of the number of examples in products: 2 for gradients of the mean loss, 1 for roots u of its Hessian,
            whose products are linear in it (`kfdist.capture.losses`).
    """

    square: Tensor | float
    power: int

    def of_products(self, examples: int, like: Tensor) -> Tensor | float:
        """Returns the factor of g g^T."""
        factor = float(examples) ** self.power
        if isinstance(self.square, Tensor):
            return self.square.to(like.device, like.dtype, non_blocking=True) * factor
        return self.square * factor

    def of_rows(self, examples: int, like: Tensor) -> Tensor | float:
        """Returns the factor of g."""
        factor = self.of_products(examples, like)
        return factor.sqrt() if isinstance(factor, Tensor) else math.sqrt(factor)


def spread(chosen: Tensor, length: int, examples: int) -> Tensor:
    """Returns where the chosen examples lie along a dim 0 of `length` that `examples` examples share evenly."""
    each = length // examples
    if each == 1:
        return chosen
    return (chosen.unsqueeze(1) * each + torch.arange(each, device="cpu")).flatten()
