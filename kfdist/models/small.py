"""Small models, for the bundled data and for tests."""

import math
from collections.abc import Sequence

from pydantic import Field
from torch import nn

from kfdist.config.fields import Counts, Section
from kfdist.errors import ConfigError


class DigitsCnn(Section):
    """Settings of the network: two convolutions, one pooling, two fully connected layers.

    With the default channels the first fully connected layer has 64 * 4 * 4 = 1024 inputs, so with its bias the largest
    curvature factor is 1025 x 1025.
    """

    channels: int = Field(
        default=32, ge=1, description="channels of the first convolution; the second has twice as many"
    )
    hidden: int = Field(default=128, ge=1, description="outputs of the first fully connected layer")

    def build(self, example_shape: Sequence[int], classes: int) -> nn.Module:
        """Makes the network, initialised from torch's global generator.

        Raises:
            ConfigError: The inputs aren't images of a size divisible by 2.
        """
        if len(example_shape) != 3 or example_shape[1] % 2 or example_shape[2] % 2:
            raise ConfigError(
                f"is 'digits-cnn'; it takes [channels, height, width] with an even height and width, but the data has "
                f"{list(example_shape)}; choose another model, such as mlp",
                path="model.name",
            )
        depth, height, width = example_shape
        wide = 2 * self.channels
        return nn.Sequential(
            nn.Conv2d(depth, self.channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(self.channels, wide, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(wide * (height // 2) * (width // 2), self.hidden),
            nn.ReLU(),
            nn.Linear(self.hidden, classes),
        )


class Mlp(Section):
    """Settings of the network: `len(hidden)` hidden layers with ReLU."""

    hidden: Counts = Field(default=(64,), description="outputs of the hidden layers")
    batch_norm: bool = Field(default=False, description="whether batch normalisation follows each hidden layer")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="share of the hidden units dropped in training")
    bias: bool = Field(default=True, description="whether the layers have a bias")

    def build(self, example_shape: Sequence[int], classes: int) -> nn.Module:
        """Makes the network, initialised from torch's global generator."""
        layers: list[nn.Module] = [nn.Flatten()]
        width = math.prod(example_shape)
        for outputs in self.hidden:
            layers.append(nn.Linear(width, outputs, bias=self.bias))
            if self.batch_norm:
                layers.append(nn.BatchNorm1d(outputs))
            layers.append(nn.ReLU())
            if self.dropout:
                layers.append(nn.Dropout(self.dropout))
            width = outputs
        layers.append(nn.Linear(width, classes, bias=self.bias))
        return nn.Sequential(*layers)
