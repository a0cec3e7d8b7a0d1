"""A task: examples to train on and to evaluate on, and the objective."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, Self, cast

import torch
from torch import Tensor
from typing_extensions import TypeVar

from kfdist.data.objective import Classification, Objective
from kfdist.data.reading import Readable, SeededReader
from kfdist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Labelled examples.

    Attributes:
        inputs: float32 [N, ...].
        labels: int64 [N], from 0.

    Raises:
        ConfigError: They aren't tensors, or not equally many.
    """

    inputs: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        for name in ("inputs", "labels"):
            if not isinstance(getattr(self, name), Tensor):
                raise ConfigError(
                    f"{name} of kfdist.data.Examples are of type {type(getattr(self, name)).__name__}; give a tensor"
                )
        if len(self.inputs) != len(self.labels):
            raise ConfigError(
                f"kfdist.data.Examples has {len(self.inputs)} inputs and {len(self.labels)} labels; give one for each"
            )

    def __len__(self) -> int:
        """Returns the number of examples N."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns an example and its label."""
        return self.inputs[index], self.labels[index]


E = TypeVar("E", bound=Readable, default=Readable, covariant=True)


def _as_they_are(inputs: Tensor) -> Tensor:
    return inputs


@dataclass(frozen=True, kw_only=True)
class DataSet(Generic[E]):
    """A task: examples to train on, examples to evaluate on, and the objective.

    Attributes:
        train: What is trained on: `Examples` in memory, or a map-style data set (`kfdist.data.reading.Readable`).
        test: What is only evaluated on.
        classes: How many outputs the model has for an example: classes, as a rule.
        objective: The loss and the metrics.
        prepare: What is done to a batch of inputs once it is on its device, such as normalising pixels.

    Raises:
        ConfigError: A part is of a wrong type or has no examples, or there are no classes.
    """

    train: E
    test: E
    classes: int
    objective: Objective = Classification()
    prepare: Callable[[Tensor], Tensor] = _as_they_are

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            examples = getattr(self, part)
            if not isinstance(examples, Readable):
                raise ConfigError(
                    f"{part} is of type {type(examples).__name__}; it must be kfdist.data.Examples or have "
                    "__len__ and __getitem__, as torch's map-style data sets do"
                )
            if not len(examples):
                raise ConfigError(f"{part} has no examples; at least one is needed")
        if not isinstance(self.classes, int) or isinstance(self.classes, bool) or self.classes < 1:
            raise ConfigError(f"classes is {self.classes!r}; it must be a whole number of at least 1")
        if not isinstance(self.objective, Objective):
            raise ConfigError(
                f"objective is of type {type(self.objective).__name__}; derive it from kfdist.data.objective.Objective"
            )

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one input, as the model gets it."""
        if isinstance(self.train, Examples):
            return tuple(self.train.inputs.shape[1:])
        batch = SeededReader(data=self.train, seed=0).__getitems__((0, [0]))
        return tuple(self.prepare(batch.inputs).shape[1:])

    def on(self, device: torch.device) -> Self:
        """Returns the same task with the examples that are in memory on a device."""

        def moved(examples: E) -> E:
            if not isinstance(examples, Examples):
                return examples
            return cast(E, Examples(inputs=examples.inputs.to(device), labels=examples.labels.to(device)))

        return replace(self, train=moved(self.train), test=moved(self.test))
