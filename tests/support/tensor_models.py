"""A model with parameters of one to five dimensions, used in ways that no capture measures, and gradients for it."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Tensors(nn.Module):
    """Float64 parameters of all numbers of dimensions; each enters the loss through a sine."""

    SHAPES: tuple[tuple[int, ...], ...] = ((5,), (4, 6), (3, 2, 4), (4, 2, 3, 2), (2, 3, 1, 2, 2))

    def __init__(self, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        made = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        self.tensors = nn.ParameterList([nn.Parameter(each) for each in made])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(torch.sin(each) * x[: each.numel()].view_as(each)).sum() for each in self.tensors]).sum()


def backward(model: nn.Module, seed: int) -> None:
    """Gives the model gradients that are different at each step."""
    generator = torch.Generator().manual_seed(100 + seed)
    model.zero_grad()
    model(torch.randn(200, generator=generator, dtype=torch.float64)).backward()


def gradients(model: nn.Module) -> Iterator[Tensor]:
    """Yields copies of the gradients in `.grad`."""
    for parameter in model.parameters():
        assert parameter.grad is not None
        yield parameter.grad.clone()
