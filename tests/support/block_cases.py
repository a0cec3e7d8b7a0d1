"""Layers of every kind that has a block, and what a block must be true to: the layer's own output and gradients."""

from typing import Any

import torch
from torch import Tensor, nn

from kfdist.curvature.blocks import Block, make_blocks
from kfdist.types import WeightSharing
from tests.support.matrices import gaussian

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SPATIAL = (9, 8, 6)
"""Sizes of the inputs of convolutions, as many as they have dimensions."""

CASES: dict[str, tuple[type[nn.Module], tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "linear": (nn.Linear, (5, 3), {}, (5,)),
    "linear-no-bias": (nn.Linear, (5, 3), {"bias": False}, (5,)),
    "linear-sequence": (nn.Linear, (5, 3), {}, (4, 5)),
    "conv1d": (nn.Conv1d, (4, 6, 3), {"stride": 2, "padding": 2, "groups": 2}, (4, 7)),
    "conv2d": (nn.Conv2d, (4, 6, 3), {"padding": 1, "dilation": 2}, (4, 6, 7)),
    "conv2d-depthwise": (nn.Conv2d, (4, 4, 3), {"padding": "same", "groups": 4}, (4, 6, 5)),
    "conv3d-no-bias": (nn.Conv3d, (2, 4, 2), {"bias": False, "padding_mode": "circular", "padding": 1}, (2, 3, 4, 3)),
    "conv-transpose1d": (nn.ConvTranspose1d, (4, 6, 4), {"stride": 2, "padding": 1, "output_padding": 1}, (4, 5)),
    "conv-transpose2d": (nn.ConvTranspose2d, (4, 6, 3), {"stride": 2, "groups": 2}, (4, 3, 4)),
    "conv-transpose3d": (nn.ConvTranspose3d, (2, 4, 2), {"stride": 3, "bias": False}, (2, 2, 1, 2)),
}
"""By name: the layer's class, its arguments, and the shape of one example."""


def make_case(name: str) -> tuple[nn.Module, Tensor]:
    """Makes a float64 layer and three examples."""
    kind, args, kwargs, shape = CASES[name]
    torch.manual_seed(0)
    return kind(*args, dtype=torch.float64, **kwargs), gaussian(3, *shape, seed=1)


def make_block(name: str, layer: nn.Module, sharing: WeightSharing = "expand") -> Block | str:
    """The block of a layer that has one, or why it has none."""
    blocks = make_blocks(name, layer, sharing)
    if isinstance(blocks, str):
        return blocks
    (block,) = blocks
    return block


def block_of(layer: nn.Module, sharing: WeightSharing = "expand") -> Block:
    block = make_block("layer", layer, sharing)
    assert isinstance(block, Block), block
    return block


def multiplied(layer: Any, inputs: Tensor) -> Tensor:
    """What a layer's weight is multiplied with: its inputs, padded where the layer does that before it convolves."""
    if getattr(layer, "padding_mode", "zeros") == "zeros":
        return inputs
    return nn.functional.pad(inputs, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)


def call(layer: nn.Module, inputs: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the layer with a loss that weighs every output differently.

    Returns:
        Output, losses per example with their graph, and the gradient of their sum with respect to the output.
    """
    output = layer(inputs, **kwargs)
    weights = gaussian(*output.shape, seed=2)
    losses = (output * weights + 0.1 * output.pow(2)).flatten(1).sum(1)
    (gradient,) = torch.autograd.grad(losses.sum(), output, retain_graph=True)
    return output, losses, gradient


def assert_true_to_its_layer(layer: nn.Module, inputs: Tensor, *, tolerance: float, **kwargs: Any) -> None:
    """Asserts what defines a block: y_t = W a_t, and sum_t g_it a_it^T is example i's gradient as autograd has it (C2).

    The forward pass is independent of how the block orders its columns; together they fix rows, order and positions.
    """
    block = block_of(layer)
    output, losses, gradient = call(layer, inputs, **kwargs)
    activation = multiplied(layer, inputs)
    a, g = block.example_rows(activation, gradient)
    W = block.to_matrix([parameter.detach() for parameter in block.parameters()])
    c, n, T, _ = a.shape
    assert T == block.positions(*block.batched(activation, gradient))
    rows = output.detach()
    if not block.has_bias and isinstance(layer.bias, Tensor):
        rows = rows - layer.bias.detach().reshape(-1, *(1,) * (output.dim() - 2))
    if block.shape.convolution:
        expected_rows = rows.reshape(n, c, -1, T).permute(1, 0, 3, 2)
    else:
        expected_rows = rows.reshape(1, n, T, -1)
    torch.testing.assert_close(a @ W.mT[:, None], expected_rows, rtol=tolerance, atol=tolerance)
    for i, loss in enumerate(losses):
        parts = torch.autograd.grad(loss, block.parameters(), retain_graph=True)
        expected = block.to_matrix(parts)
        torch.testing.assert_close(g[:, i].mT @ a[:, i], expected, rtol=tolerance, atol=tolerance)
        for found, part in zip(block.from_matrix(expected), parts, strict=True):
            assert torch.equal(found, part)
    sums = block.factor_sums(activation, gradient)
    a, g = a.flatten(1, 2), g.flatten(1, 2)
    chosen = torch.arange(0, n * T, 2, device="cpu")
    for part, rows in (("A", a), ("G", g)):
        drawn, columns = block.drawn_rows(part, *block.batched(activation, gradient), chosen)
        found = torch.zeros_like(rows[:, chosen])
        found[..., slice(None) if columns is None else columns] = drawn
        torch.testing.assert_close(found, rows[:, chosen], rtol=0, atol=0)
    reached = block.reached_inputs(*block.batched(activation, gradient))
    assert reached >= (a != 0).flatten(0, 1).any(0).sum(), "columns that are left out are zero"
    for found, expected in ((sums.A, a.mT @ a), (sums.G, g.mT @ g), (sums.a, a.sum(1)), (sums.g, g.sum(1))):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=10 * tolerance)
    assert sums.rows == n * T
    assert sums.A.shape[1:] == (block.shape.d_in,) * 2 and sums.G.shape[1:] == (block.shape.d_out,) * 2
