"""scikit-learn's copy of the UCI handwritten digits: 1,797 images of 8 x 8 pixels, no download."""

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
        # scikit-learn takes a second to import; only those who use its data pay it.
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        inputs = torch.from_numpy(pixels).to(torch.float32).div_(16.0).reshape(-1, 1, 8, 8)
        targets = torch.from_numpy(labels).to(torch.int64)
        train, test = stratified_split(targets, self.test_fraction, self.split_seed)
        return DataSet(
            train=Examples(inputs=inputs[train], labels=targets[train]),
            test=Examples(inputs=inputs[test], labels=targets[test]),
            classes=10,
        )
