"""Images of noise, for measurements: what a step costs when input costs nothing."""

from dataclasses import dataclass
from functools import cache

import torch
from pydantic import Field
from torch import Tensor

from kfdist.config.fields import Section
from kfdist.data.images import IMAGENET
from kfdist.data.objective import Classification
from kfdist.data.task import DataSet

_POOL = 16
"""Different synthetic images; drawing more would only take time."""


@cache
def _noise(size: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(size)
    return torch.randint(256, (_POOL, 3, size, size), dtype=torch.uint8, device="cpu", generator=generator)


@dataclass(frozen=True)
class Noise:
    """Images of noise that cost next to nothing, with labels in turn.

    Attributes:
        count: How many there are.
        size: Height and width.
        classes: How many classes.
    """

    count: int
    size: int
    classes: int

    def __len__(self) -> int:
        """Returns how many there are."""
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Returns an image."""
        return _noise(self.size)[index % _POOL], index % self.classes


class SyntheticImages(Section):
    """Settings of images of noise, for measurements: what a step costs when input costs nothing."""

    train_examples: int = Field(default=1_281_167, ge=1, description="training examples; ImageNet's by default")
    test_examples: int = Field(default=1000, ge=1, description="test examples")
    size: int = Field(default=224, ge=8, description="height and width")
    classes: int = Field(default=1000, ge=2, description="classes")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="share of the target spread over all classes")

    def load(self) -> DataSet[Noise]:
        """Describes the images."""
        objective = Classification(label_smoothing=self.label_smoothing, top5=self.classes > 5)
        train, test = (Noise(count, self.size, self.classes) for count in (self.train_examples, self.test_examples))
        return DataSet(train=train, test=test, classes=self.classes, objective=objective, prepare=IMAGENET)
