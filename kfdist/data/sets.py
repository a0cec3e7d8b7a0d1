"""Data sets by name, and those of them that are tensors in memory."""

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from kfdist.config.fields import Counts, Section, by_name
from kfdist.config.named_functions import is_own, own_function, own_result
from kfdist.data.cifar10 import Cifar10
from kfdist.data.images import ImageFolders
from kfdist.data.shards import ImageShards
from kfdist.data.synthetic_images import SyntheticImages
from kfdist.data.task import DataSet, Examples


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
    split_seed: int = Field(default=0, ge=0, lt=2**63, description="decides which images those are")

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
    seed: int = Field(default=0, ge=0, lt=2**63, description="seeds the examples")

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


DATA_SETS: Mapping[str, type[Digits | Synthetic | ImageFolders | ImageShards | Cifar10 | SyntheticImages]] = {
    "digits": Digits,
    "synthetic": Synthetic,
    "image-folder": ImageFolders,
    "image-shards": ImageShards,
    "cifar10": Cifar10,
    "synthetic-images": SyntheticImages,
}
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
