"""Whole parameters, cut into tensors of equal size and put together again."""

import pytest
import torch
from torch import nn

from kfdist.curvature.blocks.base import ParameterPart
from kfdist.curvature.blocks.whole import TensorBlock


def block_of(shape: tuple[int, ...], most: int) -> TensorBlock:
    module = nn.Module()
    numbers = torch.arange(1.0, 1 + torch.Size(shape).numel())
    module.register_parameter("weight", nn.Parameter(numbers.reshape(shape)))
    return TensorBlock("weight", module, ParameterPart("weight", module.weight), "", most=most)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("shape", "most", "modes", "groups"),
    [
        ((7,), 8, (7,), 1),
        ((7,), 3, (3,), 3),
        ((5, 6), 8, (5, 6), 1),
        ((5, 9), 4, (3, 3), 6),
        ((3, 10, 2), 5, (3, 5, 2), 2),
        ((4, 3, 3, 3), 3, (2, 3, 3, 3), 2),
        ((2, 3, 2, 2, 4), 8, (2, 3, 2, 8), 1),
        ((2, 3, 2, 2, 4), 3, (2, 3, 2, 3), 3),
    ],
)
def test_every_entry_is_in_one_tensor_and_comes_back(
    shape: tuple[int, ...], most: int, modes: tuple[int, ...], groups: int
) -> None:
    block = block_of(shape, most)
    weight = block.parts[0].parameter.detach()
    assert (block.shape.modes, block.shape.groups) == (modes, groups)
    matrix = block.to_matrix([weight])
    assert matrix.shape == (groups, block.shape.d_out, block.shape.d_in)
    assert sorted(matrix[matrix != 0].tolist()) == weight.flatten().tolist()
    assert torch.equal(block.from_matrix(matrix)[0], weight)


def test_neighbours_stay_neighbours() -> None:
    matrix = block_of((4, 6), 3).to_matrix([torch.arange(24.0).reshape(4, 6)])
    assert matrix[1].tolist() == [[3.0, 4.0, 5.0], [9.0, 10.0, 11.0]]
    assert matrix[2].tolist() == [[12.0, 13.0, 14.0], [18.0, 19.0, 20.0]]


def test_a_gradient_is_overwritten_through_the_cut() -> None:
    block = block_of((5, 9), 4)
    parameter = block.parts[0].parameter
    parameter.grad = torch.randn(5, 9)
    before = parameter.grad.clone()
    block.write_gradient(2 * block.gradient())
    assert torch.equal(parameter.grad, 2 * before)
