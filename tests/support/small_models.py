"""Small models and data that several test files train."""

import time
from typing import Any

import torch
from torch import nn

from kfdist.models.small import DigitsCnn


def small_cnn(*, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A grouped and a strided convolution, two linear layers, one of them without bias."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 3, 3, stride=2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 6, bias=False),
        nn.Tanh(),
        nn.Linear(6, 3),
    ).to(dtype)


def images(n: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """`n` random 2x6x6 images with labels out of 3."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, 6, 6, generator=generator, dtype=dtype)
    return x, torch.randint(0, 3, (n,), generator=generator)


def unhurried_mlp(example_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Three linear layers and a rest, as `unhurried`."""
    return unhurried(
        nn.Sequential(
            *(nn.Flatten(), nn.Linear(example_shape[0], 24), nn.Tanh()),
            *(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, classes)),
        )
    )


def unhurried_cnn(example_shape: tuple[int, ...], classes: int) -> nn.Module:
    """The digits' network, small, and a rest, as `unhurried`."""
    return unhurried(DigitsCnn(channels=8, hidden=32).build(example_shape, classes))


def unhurried(model: nn.Module) -> nn.Module:
    """Gives a model a rest of 20 ms a step, so that a run that a test looks at leaves the cores to others."""

    def rest(*_: Any) -> None:
        time.sleep(0.02)

    model.register_forward_pre_hook(rest)
    return model
