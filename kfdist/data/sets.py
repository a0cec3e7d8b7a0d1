"""Data sets by name, divided into training and test examples."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, Self, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypeVar

from kfdist.config.fields import Counts, Section, by_name
from kfdist.config.named_functions import is_own, own_function, own_result
from kfdist.data.objective import Classification, Objective
from kfdist.data.reading import Readable, SeededReader
from kfdist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Labelled examples.

    Attributes:
        inputs: float32 [N, ...].
        labels: int64 [N], from 0.
    """

    inputs: Tensor
    labels: Tensor

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
        ConfigError: A part is of a wrong type, or has no examples.
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
                    f"{part} is of type {type(examples).__name__}; it must be kfdist.data.sets.Examples or have "
                    "__len__ and __getitem__, as torch's map-style data sets do"
                )
            if not len(examples):
                raise ConfigError(f"{part} has no examples; at least one is needed")
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


def stratified_split(labels: Tensor, test_fraction: float, generator_seed: int) -> tuple[Tensor, Tensor]:
    """Divides examples so that every class has the same share in both parts.

    Args:
        labels: int64 [N].
        test_fraction: Share of each class that goes to the test part, rounded to whole examples, at least one.
        generator_seed: The split depends on this and the labels alone.

    Returns:
        Indices of the training and of the test examples, ascending.
    """
    generator = torch.Generator(device="cpu").manual_seed(generator_seed)
    test = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        count = max(1, round(test_fraction * len(members)))
        test[members[torch.randperm(len(members), generator=generator, device="cpu")[:count]]] = True
    return (~test).nonzero().flatten(), test.nonzero().flatten()


class Digits(Section):
    """scikit-learn's copy of the UCI handwritten digits: 1,797 images of 8 x 8 pixels, no download."""

    test_fraction: float = Field(default=0.2, gt=0, lt=1, description="share of the images kept for the test")
    split_seed: int = Field(default=0, ge=0, description="decides which images those are")

    def load(self) -> DataSet[Examples]:
        """Reads the images, [N, 1, 8, 8] with pixels from 0 to 1."""
        table = torch.from_numpy(np.loadtxt(_digits_table(), delimiter=","))  # 64 pixels and the label a row
        inputs = table[:, :-1].to(torch.float32).div_(16.0).reshape(-1, 1, 8, 8)
        targets = table[:, -1].to(torch.int64)
        train, test = stratified_split(targets, self.test_fraction, self.split_seed)
        return DataSet(
            train=Examples(inputs=inputs[train], labels=targets[train]),
            test=Examples(inputs=inputs[test], labels=targets[test]),
            classes=10,
        )


def _digits_table() -> Path:
    """Finds the file that sklearn.datasets.load_digits reads; importing it takes a second of every process."""
    package = find_spec("sklearn")
    assert package is not None and package.origin is not None, "scikit-learn is a dependency of kfdist"
    return Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"


class Synthetic(Section):
    """Settings of a synthetic data set: one Gaussian cloud per class, with an ill-conditioned common covariance."""

    train_examples: int = Field(default=1024, ge=1, description="training examples")
    test_examples: int = Field(default=256, ge=1, description="test examples")
    shape: Counts = Field(default=(1, 8, 8), min_length=1, description="shape of one input")
    classes: int = Field(default=10, ge=2, description="classes")
    noise: float = Field(default=0.5, ge=0, description="standard deviation of the clouds; their centres have 1")
    condition: float = Field(default=100.0, ge=1, description="largest over smallest variance of the inputs")
    seed: int = Field(default=0, ge=0, description="seeds the examples")

    def load(self) -> DataSet[Examples]:
        """Draws the examples; the same settings give the same ones."""
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        features = math.prod(self.shape)
        centres = torch.randn(self.classes, features, generator=generator, dtype=torch.float32, device="cpu")
        # Standard deviations fall evenly in the logarithm, so that plain gradient descent is slow on them.
        scales = torch.logspace(0, -0.5, features, base=self.condition, dtype=torch.float32, device="cpu")
        return DataSet(
            train=self._draw(self.train_examples, centres, scales, generator),
            test=self._draw(self.test_examples, centres, scales, generator),
            classes=self.classes,
        )

    def _draw(self, count: int, centres: Tensor, scales: Tensor, generator: torch.Generator) -> Examples:
        labels = torch.arange(count, device="cpu") % self.classes
        noise = torch.randn(count, centres.shape[1], generator=generator, dtype=torch.float32, device="cpu")
        inputs = (centres[labels] + self.noise * noise) * scales
        return Examples(inputs=inputs.reshape(count, *self.shape), labels=labels)


DATA_SETS: Mapping[str, type[Digits | Synthetic]] = {"digits": Digits, "synthetic": Synthetic}
"""Every data set by the name that `data.name` gives it; its fields are the `data.settings`."""


def load_data(name: str, settings: Mapping[str, Any]) -> DataSet:
    """Loads a data set by name, or by the path of a function that returns one.

    Raises:
        ConfigError: The name or a setting is unknown or not allowed, or the function returns something else.
    """
    if not is_own(name):
        return by_name(DATA_SETS, name, settings, section="data").load()
    function = own_function(name, section="data")
    return own_result(function, settings, wanted=DataSet, section="data")
