"""What users say of a micro-batch: how many terms its loss averages, and which positions it counts."""

import operator
from contextlib import suppress
from dataclasses import dataclass, replace

from torch import Tensor

from kfdist import checks


@dataclass(frozen=True)
class Stated:
    """What the user says of a micro-batch.

    Attributes:
        examples: How many terms its loss averages; None: dim 0 of the input.
        mask: Which positions its loss counts, `[N, T]` or one after another; None: all.
        strange: Whether the mask held other numbers than 0 and 1, a boolean scalar where only the device knows.
        from_target: Whether the mask is that of a target's ignored terms.
    """

    examples: int | None = None
    mask: Tensor | None = None
    strange: Tensor | None = None
    from_target: bool = False

    def completed(self, other: "Stated") -> "Stated":
        """Returns it with what only `other` says."""
        of_mask = other if self.mask is None else self
        return replace(of_mask, examples=other.examples if self.examples is None else self.examples)


NOTHING_STATED = Stated()


def checked_examples(examples: object) -> int:
    """Returns a stated number of terms.

    Raises:
        ConfigError: It is not a positive whole number.
    """
    stated = examples
    if not isinstance(examples, bool):  # NumPy's integers count, True doesn't
        with suppress(TypeError):
            stated = operator.index(examples)  # pyright: ignore[reportArgumentType]
    return checks.count("examples", stated, least=1, hint="the terms that the loss averages")
