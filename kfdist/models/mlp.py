"""A fully connected network."""

import math
from collections.abc import Sequence

from pydantic import Field
from torch import nn

from kfdist.config.fields import Counts, Section


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
