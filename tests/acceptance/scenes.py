"""The models and batches on which the equivalences of algorithms.md 10 are shown; made once each."""

import functools

import torch
from torch import Tensor, nn

from tests.acceptance.sides import Batch, Scene, measure
from tests.support.matrices import gaussian
from tests.support.small_models import images, small_cnn


@functools.cache
def cnn() -> Scene:
    """Convolutions, one of them grouped, and Linear layers; four batches."""
    return measure(small_cnn(), [images(5, seed=k) for k in range(4)])


@functools.cache
def one_batch() -> Scene:
    """The same on one batch: the moving average is that batch."""
    return measure(small_cnn(), [images(5)])


@functools.cache
def one_example() -> Scene:
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
def wide() -> Scene:
    """`wide_mlp` over four batches of four examples: the averages have rank 16, at most as many as the sizes."""
    return measure(wide_mlp(), [wide_batch(seed=k) for k in range(4)], coupled=True)


@functools.cache
def one_layer() -> Scene:
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
def convolution(kernel: int, size: int) -> Scene:
    return measure(Convolved(*layers(kernel, size)), [image_batch(size)])


@functools.cache
def sequence(kernel: int, size: int) -> Scene:
    """The same layers as `convolution`, the first as a Linear one over the positions."""
    return measure(Patches(*layers(kernel, size)), [image_batch(size)])
