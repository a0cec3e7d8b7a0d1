"""Made-up classification tasks of any shape: for tests, benchmarks and dry runs."""

import torch
from pydantic import Field

from kfdist.config.fields import Counts, Section
from kfdist.data.sets import DataSet, Examples


class Synthetic(Section):
    """Settings of a synthetic data set: one Gaussian cloud per class, with an ill-conditioned common covariance."""

    train_examples: int = Field(default=1024, ge=1, description="training examples")
    test_examples: int = Field(default=256, ge=1, description="test examples")
    shape: Counts = Field(default=(1, 8, 8), min_length=1, description="shape of one input")
    classes: int = Field(default=10, ge=2, description="classes")
    noise: float = Field(default=0.5, ge=0, description="standard deviation of the clouds; their centres have 1")
    condition: float = Field(default=100.0, ge=1, description="largest over smallest variance of the inputs")
    seed: int = Field(default=0, ge=0, description="seeds the examples")

    def load(self) -> DataSet:
        """Draws the examples; the same settings give the same ones."""
        generator = torch.Generator().manual_seed(self.seed)
        features = int(torch.tensor(self.shape).prod())
        centres = torch.randn(self.classes, features, generator=generator)
        # Standard deviations fall evenly in the logarithm, so that plain gradient descent is slow on them.
        scales = torch.logspace(0, -0.5, features, base=self.condition)
        return DataSet(
            train=self._draw(self.train_examples, centres, scales, generator),
            test=self._draw(self.test_examples, centres, scales, generator),
            classes=self.classes,
        )

    def _draw(self, count: int, centres: torch.Tensor, scales: torch.Tensor, generator: torch.Generator) -> Examples:
        labels = torch.arange(count) % self.classes
        noise = self.noise * torch.randn(count, centres.shape[1], generator=generator)
        inputs = (centres[labels] + noise) * scales
        return Examples(inputs=inputs.reshape(count, *self.shape), labels=labels)
