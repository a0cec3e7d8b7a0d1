"""Small models and data of one's own for forecasts: convolutions of several kinds, and a transformer of tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kfdist.data.objective import Classification
from kfdist.data.task import DataSet, Examples

TOKENS, LENGTH = 50, 12


class Tagger(nn.Module):
    """A transformer's layer over tokens, pooled for one class."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, width)
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens)).mean(1))


def tagger(*, example_shape: Sequence[int], classes: int, width: int = 64) -> nn.Module:
    del example_shape
    return Tagger(width, classes)


def tokens(*, examples: int = 96) -> DataSet[Examples]:
    """Random tokens; `Examples` are typed as float32, and hold what they are given."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Examples:
        inputs = torch.randint(TOKENS, (count, LENGTH), generator=generator)
        return Examples(inputs=inputs, labels=torch.arange(count) % 3)

    return DataSet(train=draw(examples), test=draw(12), classes=3, objective=Classification())


def convolutions(*, example_shape: Sequence[int], classes: int) -> nn.Module:
    """Stride, groups, no bias, norms: the factors of KFC."""
    return nn.Sequential(
        nn.Conv2d(example_shape[0], 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, groups=2),
        nn.GroupNorm(4, 64),
        nn.ReLU(),
        nn.Conv2d(64, 96, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(96, classes),
    )


class Branching(nn.Module):
    """Looks at its values to decide what it does."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.flatten(1)
        return self.layer(flat if bool(flat.sum() > 0) else -flat)


def branching(*, example_shape: Sequence[int], classes: int) -> nn.Module:
    return Branching(int(torch.tensor(tuple(example_shape), device="cpu").prod()), classes)


def valued(*, example_shape: Sequence[int], classes: int) -> nn.Module:
    """Looks at a weight while it is made."""
    layer = nn.Linear(int(torch.tensor(tuple(example_shape), device="cpu").prod()), classes)
    if float(layer.weight.detach().abs().max()) > 1:
        raise ValueError("a strange initialisation")
    return nn.Sequential(nn.Flatten(), layer)


class Squashed(nn.Module):
    """Has a parameter that is used in a way that can't be measured."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, classes)
        self.log_scale = nn.Parameter(torch.zeros(classes))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs.flatten(1)) * self.log_scale.exp()


def squashed(*, example_shape: Sequence[int], classes: int) -> nn.Module:
    return Squashed(int(torch.tensor(tuple(example_shape), device="cpu").prod()), classes)


def frozen_in_part(*, example_shape: Sequence[int], classes: int) -> nn.Module:
    """A layer that is trained behind one that isn't."""
    width = int(torch.tensor(tuple(example_shape), device="cpu").prod())
    return nn.Sequential(nn.Flatten(), nn.Linear(width, 32).requires_grad_(False), nn.Tanh(), nn.Linear(32, classes))


def lazy(*, example_shape: Sequence[int], classes: int) -> nn.Module:
    """A layer of which nobody knows how wide it is before the first forward."""
    del example_shape
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(32), nn.Tanh(), nn.Linear(32, classes))
