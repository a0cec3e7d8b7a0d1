"""The problems that equivalences are shown on: real layers, measured in float64 over a few batches; made once each.

A `Problem` holds what a model's layers contribute to the curvature, as capture measures it and the moving average folds
it, and the gradients that are to be preconditioned.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfdist.capture.capture import Capture
from kfdist.capture.requests import CHAIN_SUMS, COARSE_SUMS, PLAIN_SUMS
from kfdist.curvature.averages import WeightedSums, decay_at, means
from kfdist.curvature.statistics import (
    ChainFactors,
    CoarseFactors,
    Increment,
    KroneckerFactors,
    MeanVectors,
    Samples,
)
from tests.support.factors import armed_capture, blocks_of
from tests.support.matrices import gaussian
from tests.support.small_models import images, small_cnn

Batch = tuple[Tensor, Tensor]

DECAY = 0.9

ALL = 10**6
"""More examples, or a larger rank, than anything here has."""


@dataclass(frozen=True)
class Problem:
    """What some batches say of a model's blocks, in the model's order.

    Attributes:
        foldings: Per batch and block, what the online methods get: the rows of this folding and the dense average.
        statistics: By kind of record and block, what the others get: sums averaged over all batches, samples of the
            last one.
        gradients: V of the last batch, by block.
    """

    foldings: Sequence[Mapping[str, Increment]]
    statistics: Mapping[type, Mapping[str, Any]]
    gradients: Mapping[str, Tensor]

    @property
    def factors(self) -> Mapping[str, KroneckerFactors]:
        return self.statistics[KroneckerFactors]

    @property
    def samples(self) -> Mapping[str, Samples]:
        return self.statistics[Samples]


def measure(model: nn.Module, batches: Sequence[Batch], *, coupled: bool = False) -> Problem:
    """Measures the blocks of a model over some batches of cross entropy.

    Args:
        model: In float64.
        batches: One per folding.
        coupled: Measure also what methods that couple blocks want; the layers must be a chain of Linear ones.
    """
    blocks = blocks_of(model)
    groups = [list(blocks)] if coupled else []
    capture = armed_capture(
        model,
        chains=groups,
        coarse=groups,
        sums=PLAIN_SUMS | (CHAIN_SUMS | COARSE_SUMS if coupled else frozenset()),
        rows=frozenset({"A", "G"}),
        samples=ALL,
    )
    averages: dict[str, WeightedSums] = {}
    foldings, samples = [], {}
    for k, batch in enumerate(batches):
        increments, samples = _fold(capture, model, batch, averages, decay_at(k + 1, DECAY))
        foldings.append(increments)
    return Problem(foldings, _records(averages, samples, coupled), {name: b.gradient() for name, b in blocks.items()})


def _fold(
    capture: Capture, model: nn.Module, batch: Batch, averages: dict[str, WeightedSums], rho: float
) -> tuple[dict[str, Increment], dict[str, Samples]]:
    """Folds one batch into the averages; returns its increments and its samples."""
    model.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    increments, samples, drained = {}, {}, capture.drain()
    for name in blocks_of(model):  # what is drained comes in the order of the backward pass
        each = drained[name]
        shapes = {part: tuple(total.shape) for part, total in each.sums.items()}
        average = averages.setdefault(name, WeightedSums(shapes, dtype=torch.float64, device="cpu"))
        average.fold(each, rho)
        increments[name] = Increment(
            A_rows=(1 - rho) ** 0.5 * each.rows["A"],
            G_rows=(1 - rho) ** 0.5 * each.rows["G"],
            examples=torch.tensor((1 - rho) * each.examples, dtype=torch.float64),
            positions=torch.tensor((1 - rho) * each.positions, dtype=torch.float64),
            decay=torch.tensor(rho, dtype=torch.float64),
            **{part: mean for part, mean in means({**average.sums, **average.counts}).items() if part in ("A", "G")},
        )
        rows = each.samples
        assert rows is not None
        samples[name] = Samples(
            a=rows.a,
            g=rows.g,
            weight=rows.weight,
            terms=rows.terms,
            source=torch.zeros(len(rows.weight), dtype=torch.int64),
            positions=rows.positions,
        )
    return increments, samples


def _records(
    averages: Mapping[str, WeightedSums], samples: Mapping[str, Samples], coupled: bool
) -> dict[type, Mapping[str, Any]]:
    found = {name: means({**each.sums, **each.counts}) for name, each in averages.items()}
    wanted: dict[type, tuple[str, ...]] = {KroneckerFactors: ("A", "G"), MeanVectors: ("a", "g")}
    if coupled:
        wanted[ChainFactors] = ("A", "G", "A_next", "G_next")
        wanted[CoarseFactors] = ("A", "G", "a_cross", "g_cross")
    records: dict[type, Mapping[str, Any]] = {
        kind: {name: kind(**{part: each[part] for part in parts}) for name, each in found.items()}
        for kind, parts in wanted.items()
    }
    return {**records, Samples: samples}


# The problems -------------------------------------------------------------------------------------------------------


@functools.cache
def cnn() -> Problem:
    """Convolutions, one of them grouped, and Linear layers; four batches."""
    return measure(small_cnn(), [images(5, seed=k) for k in range(4)])


@functools.cache
def one_batch() -> Problem:
    """The same on one batch: the moving average is that batch."""
    return measure(small_cnn(), [images(5)])


@functools.cache
def one_example() -> Problem:
    """Linear layers that saw one example, so that the Fisher block is the product of its factors."""
    return measure(wide_mlp(), [wide_batch(1)])


def wide_mlp(seed: int = 0) -> nn.Module:
    """A chain of Linear layers, one of them without bias; its hidden factors have room for Brand's updates."""
    torch.manual_seed(seed)
    layers = [nn.Linear(16, 18), nn.Tanh(), nn.Linear(18, 17, bias=False), nn.Tanh(), nn.Linear(17, 16)]
    return nn.Sequential(*layers).double()


def wide_batch(n: int = 4, *, seed: int = 0) -> Batch:
    """A batch for `wide_mlp`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 16, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 16, (n,), generator=generator)


@functools.cache
def wide() -> Problem:
    """`wide_mlp` over four batches of four examples: the averages have rank 16, at most as many as the sizes."""
    return measure(wide_mlp(), [wide_batch(seed=k) for k in range(4)], coupled=True)


@functools.cache
def one_layer() -> Problem:
    """A chain of one Linear layer."""
    torch.manual_seed(0)
    x, y = wide_batch(8)
    return measure(nn.Sequential(nn.Linear(16, 18)).double(), [(x, y)], coupled=True)


class Patches(nn.Module):
    """A convolution written as a Linear layer over the sequence of its patches."""

    def __init__(self, conv: nn.Conv2d, head: nn.Linear) -> None:
        super().__init__()
        self.first = nn.Linear(conv.weight[0].numel(), conv.out_channels).double()
        self.first.load_state_dict({"weight": conv.weight.detach().flatten(1), "bias": conv.bias})
        self.kernel, self.padding, self.second = conv.kernel_size, conv.padding, head

    def forward(self, x: Tensor) -> Tensor:
        assert not isinstance(self.padding, str)
        patches = nn.functional.unfold(x, self.kernel, padding=self.padding).mT
        return self.second(torch.tanh(self.first(patches)).mT.flatten(1))


class Convolved(nn.Module):
    """A convolution and a Linear layer."""

    def __init__(self, conv: nn.Conv2d, head: nn.Linear) -> None:
        super().__init__()
        self.first, self.second = conv, head

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)).flatten(1))


def layers(kernel: int, size: int) -> tuple[nn.Conv2d, nn.Linear]:
    """A convolution of `size` x `size` images that keeps their size, and a layer on what it makes of them."""
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 4, kernel, padding=kernel // 2)
    return conv.double(), nn.Linear(4 * size * size, 3).double()


def image_batch(size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return gaussian(6, 5, size, size, seed=0), torch.randint(0, 3, (6,), generator=generator)


@functools.cache
def convolution(kernel: int, size: int) -> Problem:
    return measure(Convolved(*layers(kernel, size)), [image_batch(size)])


@functools.cache
def sequence(kernel: int, size: int) -> Problem:
    """The same layers as `convolution`, the first as a Linear one over the positions."""
    return measure(Patches(*layers(kernel, size)), [image_batch(size)])
