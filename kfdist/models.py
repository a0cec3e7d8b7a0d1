"""Models by name."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import nn

from kfdist.config.fields import Counts, Section, by_name
from kfdist.config.named_functions import is_own, own_function, own_result
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


MODELS: Mapping[str, type[DigitsCnn | Mlp]] = {"digits-cnn": DigitsCnn, "mlp": Mlp}
"""Every model by the name that `model.name` gives it; its fields are the `model.settings`."""


def build_model(
    name: str, settings: Mapping[str, Any], *, example_shape: Sequence[int], classes: int, seed: int
) -> nn.Module:
    """Builds a model by name, or by a function of the user's, on the CPU; the same seed gives the same parameters.

    Torch's global generator is left as it was.

    Raises:
        ConfigError: The name or a setting is unknown or not allowed, the model doesn't fit the data, or the function
            returns something else.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not is_own(name):
            return by_name(MODELS, name, settings, section="model").build(example_shape, classes)
        function = own_function(name, section="model")
        shape = tuple(example_shape)
        return own_result(function, settings, wanted=nn.Module, section="model", example_shape=shape, classes=classes)
