"""scikit-learn's copy of the UCI handwritten digits: 1,797 images of 8 x 8 pixels, no download."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from kfdist.config.fields import Section
from kfdist.data.sets import DataSet, Examples, stratified_split


class Digits(Section):
    """Settings of the digits data set."""

    test_fraction: float = Field(default=0.2, gt=0, lt=1, description="share of the images kept for the test")
    split_seed: int = Field(default=0, ge=0, description="decides which images those are")

    def load(self) -> DataSet:
        """Reads the images, [N, 1, 8, 8] with pixels from 0 to 1."""
        table = torch.from_numpy(np.loadtxt(_table(), delimiter=","))  # 64 pixels and the label a row
        inputs = table[:, :-1].to(torch.float32).div_(16.0).reshape(-1, 1, 8, 8)
        targets = table[:, -1].to(torch.int64)
        train, test = stratified_split(targets, self.test_fraction, self.split_seed)
        return DataSet(
            train=Examples(inputs=inputs[train], labels=targets[train]),
            test=Examples(inputs=inputs[test], labels=targets[test]),
            classes=10,
        )


def _table() -> Path:
    """Finds the file that sklearn.datasets.load_digits reads; importing it takes a second of every process."""
    package = find_spec("sklearn")
    assert package is not None and package.origin is not None, "scikit-learn is a dependency of kfdist"
    return Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
