"""Which layers get a block, and what is said of the others."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from kfdist.curvature.blocks import Block, LayerBlock, make_blocks
from kfdist.types import BlockShape
from tests.support.block_cases import make_block


class Renamed(nn.Linear):
    """A subclass that computes the same is fine."""


def frozen(layer: nn.Module, *names: str) -> nn.Module:
    for name in names:
        getattr(layer, name).requires_grad_(False)
    return layer


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Embedding(3, 4, max_norm=1.0), "with max_norm = 1.0 a row's gradient"),
        (frozen(nn.LayerNorm(3), "weight", "bias"), "its weight is frozen"),
        (nn.LazyLinear(4), "run one forward pass first"),
        (nn.LazyConv2d(4, 3), "run one forward pass first"),
        (nn.LazyConvTranspose1d(4, 3), "run one forward pass first"),
        (parametrizations.weight_norm(nn.Linear(3, 4)), "its weight is computed"),
        (nn.Linear(3, 4, dtype=torch.complex64), "not a real floating-point type"),
        (frozen(nn.Linear(3, 4), "weight"), "its weight is frozen"),
        (frozen(nn.Conv2d(3, 4, 2), "weight", "bias"), "its weight is frozen"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_layer_without_a_block_says_why(module: nn.Module, reason: str) -> None:
    found = make_block("layer", module)
    assert isinstance(found, str)
    assert reason in found


@pytest.mark.parametrize("module", [nn.Linear(3, 4), Renamed(3, 4), nn.Linear(3, 4, dtype=torch.bfloat16)])
def test_a_supported_layer_gets_one(module: nn.Linear) -> None:
    block = make_block("deep.layer", module)
    assert isinstance(block, Block)
    assert (block.name, block.module) == ("deep.layer", module)
    assert block.shape == BlockShape(d_out=4, d_in=4)
    assert block.parameters()[0] is module.weight and block.parameters()[1] is module.bias


@pytest.mark.parametrize("sizes", [{}, {"kdim": 3, "vdim": 5}], ids=["packed", "apart"])
def test_attention_has_a_block_of_each_projection(sizes: dict[str, Any]) -> None:
    blocks = make_blocks("attention", nn.MultiheadAttention(4, 2, **sizes))
    assert not isinstance(blocks, str)
    assert {block.name: (block.layer, block.shape) for block in blocks} == {
        "attention.q_proj": ("attention", BlockShape(d_out=4, d_in=5)),
        "attention.k_proj": ("attention", BlockShape(d_out=4, d_in=1 + sizes.get("kdim", 4))),
        "attention.v_proj": ("attention", BlockShape(d_out=4, d_in=1 + sizes.get("vdim", 4))),
    }


def test_parts_of_one_parameter_are_read_and_written_apart() -> None:
    layer = nn.MultiheadAttention(4, 2)
    blocks = make_blocks("attention", layer)
    assert not isinstance(blocks, str)
    for parameter in layer.parameters():
        parameter.grad = torch.randn_like(parameter)
    assert layer.in_proj_weight.grad is not None
    before = layer.in_proj_weight.grad.clone()
    V = blocks[1].gradient()
    torch.testing.assert_close(V[0, :, :4], before[4:8])
    blocks[1].write_gradient(2 * V)
    torch.testing.assert_close(layer.in_proj_weight.grad, torch.cat([before[:4], 2 * before[4:8], before[8:]]))


def test_a_frozen_bias_is_left_out_of_the_block() -> None:
    layer = frozen(nn.Conv2d(4, 6, 3, groups=2), "bias")
    block = make_block("conv", layer)
    assert isinstance(block, LayerBlock)
    assert not block.has_bias
    assert block.shape == BlockShape(d_out=3, d_in=18, groups=2, convolution=True)
    assert len(block.parameters()) == 1
    assert block.factor_sums(torch.ones(1, 4, 3, 3), torch.ones(1, 6, 1, 1)).A.shape == (2, 18, 18)


@pytest.mark.parametrize("layer", [nn.Conv1d(2, 4, 3), nn.ConvTranspose2d(4, 2, 3, stride=2, groups=2)])
def test_a_resized_layer_is_noticed(layer: nn.Module) -> None:
    block = make_block("conv", layer)
    assert isinstance(block, Block)
    assert not block.resized
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    weight.data = weight.data[:1]
    assert block.resized
