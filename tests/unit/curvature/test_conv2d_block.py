"""Convolution blocks against autograd and an independent im2col, in float64: C1, C2, C3 of algorithms.md."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kfdist.curvature.blocks import Block, base, make_block
from kfdist.curvature.references import per_example_gradients
from tests.support.matrices import gaussian

TOLERANCE = 1e-11
"""Float64 sums of at most a few thousand products of numbers of size one."""

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "stride": {"kernel_size": (3, 2), "stride": (2, 3)},
    "padding": {"kernel_size": 3, "padding": (2, 1)},
    "same": {"kernel_size": (2, 4), "padding": "same", "dilation": (3, 1)},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "dilation": {"kernel_size": 3, "padding": 2, "dilation": (2, 1), "stride": 2},
    "groups": {"kernel_size": 3, "groups": 2, "padding": 1},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1, "stride": 2},
    "no-bias": {"kernel_size": 3, "bias": False, "groups": 2},
    "reflect": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": 2, "padding_mode": "replicate", "stride": 2},
    "circular": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular", "groups": 2},
    "circular-same": {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
    "pointwise": {"kernel_size": 1},
}

# torch copies its input for an odd amount of "same" padding and says so.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

over_geometries = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())


def conv(**geometry: Any) -> tuple[nn.Conv2d, Block]:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, dtype=torch.float64, **geometry)
    block = make_block("conv", layer)
    assert isinstance(block, Block)
    return layer, block


def call(layer: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Runs the layer with a loss that weighs every output differently; returns per-example losses and dLoss/dOutput."""
    output = layer(images)
    weights = gaussian(*output.shape, seed=2)
    losses = (output * weights + 0.1 * output.pow(2)).flatten(1).sum(1)
    (gradient,) = torch.autograd.grad(losses.sum(), output, retain_graph=True)
    return losses, gradient


def padded_by_torch(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """Pads as the layer itself does, seen through a convolution that copies each channel's window."""
    area = layer.kernel_size[0] * layer.kernel_size[1]
    copying = nn.Conv2d(
        4,
        4 * area,
        layer.kernel_size,
        groups=4,
        bias=False,
        dtype=torch.float64,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        padding_mode=layer.padding_mode,
    )
    with torch.no_grad():
        copying.weight.copy_(torch.eye(area).repeat(4, 1).reshape(copying.weight.shape))
        return copying(images).flatten(2)  # [N, C kh kw, T]


@over_geometries
def test_c2_rows_rebuild_autograds_weight_gradient(geometry: dict[str, Any]) -> None:
    """C2: sum_t g_nt a_nt^T is the gradient of example n, which fixes patch order, stride, padding and dilation."""
    layer, block = conv(**geometry)
    images = gaussian(3, 4, 9, 8, seed=1)
    losses, gradient = call(layer, images)
    expected = per_example_gradients(block, losses)
    for n in range(3):
        a, g = block.batched(images[n : n + 1], gradient[n : n + 1])
        rows = block.input_rows(a)
        if block.has_bias:
            rows = torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)
        torch.testing.assert_close(block.output_rows(g).mT @ rows, expected[n], rtol=TOLERANCE, atol=TOLERANCE)


@over_geometries
def test_sums_equal_those_of_torchs_own_patches(geometry: dict[str, Any]) -> None:
    layer, block = conv(**geometry)
    images = gaussian(3, 4, 9, 8, seed=1)
    _, gradient = call(layer, images)
    sums = block.factor_sums(images, gradient)
    patches = padded_by_torch(layer, images)
    n, _, positions = patches.shape
    c = layer.groups
    rows = patches.reshape(n, c, -1, positions).permute(1, 0, 3, 2).reshape(c, n * positions, -1)
    if block.has_bias:
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)
    out = gradient.reshape(n, c, -1, positions).permute(1, 0, 3, 2).reshape(c, n * positions, -1)
    torch.testing.assert_close(sums.A, rows.mT @ rows, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(sums.G, out.mT @ out, rtol=TOLERANCE, atol=TOLERANCE)
    assert sums.rows == n * positions
    assert sums.A.shape == (c, block.shape.d_in, block.shape.d_in)
    assert sums.G.shape == (c, block.shape.d_out, block.shape.d_out)


@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.one_of(st.tuples(st.integers(0, 3), st.integers(0, 3)), st.sampled_from(["same", "valid"])),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_any_geometry_that_torch_takes(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: Any,
    mode: str,
    groups: int,
    bias: bool,
) -> None:
    if padding == "same":
        stride = (1, 1)
    images = gaussian(2, 4, 8, 7, seed=1)
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups, bias, padding_mode=mode, dtype=torch.float64)
    try:
        losses, gradient = call(layer, images)
    except RuntimeError:
        assume(False)  # the kernel is larger than the image
    block = make_block("conv", layer)
    assert isinstance(block, Block)
    a, g = block.batched(images, gradient)
    rows = block.input_rows(a)
    if block.has_bias:
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)
    total = per_example_gradients(block, losses).sum(0)
    torch.testing.assert_close(block.output_rows(g).mT @ rows, total, rtol=TOLERANCE, atol=10 * TOLERANCE)


def test_c1_a_pointwise_kernel_on_one_pixel_is_a_linear_layer() -> None:
    _, block = conv(kernel_size=1)
    linear = make_block("linear", nn.Linear(4, 8, dtype=torch.float64))
    assert isinstance(linear, Block)
    a, g = gaussian(5, 4, seed=1), gaussian(5, 8, seed=2)
    as_conv, as_linear = block.factor_sums(a[..., None, None], g[..., None, None]), linear.factor_sums(a, g)
    torch.testing.assert_close(as_conv.A, as_linear.A, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(as_conv.G, as_linear.G, rtol=TOLERANCE, atol=TOLERANCE)
    assert as_conv.rows == as_linear.rows == 5
    assert block.shape == linear.shape


@pytest.mark.parametrize("groups", [2, 4])
def test_c3_groups_are_separate_convolutions(groups: int) -> None:
    layer, block = conv(kernel_size=3, groups=groups, padding=1, stride=2)
    images = gaussian(3, 4, 9, 8, seed=1)
    _, gradient = call(layer, images)
    together = block.factor_sums(images, gradient)
    for j in range(groups):
        alone = nn.Conv2d(4 // groups, 8 // groups, 3, padding=1, stride=2, dtype=torch.float64)
        single = make_block("alone", alone)
        assert isinstance(single, Block)
        part = single.factor_sums(images.chunk(groups, 1)[j], gradient.chunk(groups, 1)[j])
        torch.testing.assert_close(together.A[j], part.A[0], rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(together.G[j], part.G[0], rtol=TOLERANCE, atol=TOLERANCE)
        assert together.rows == part.rows


def test_tiles_change_nothing_but_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, block = conv(kernel_size=3, padding=1)
    images = gaussian(7, 4, 6, 6, seed=1)
    _, gradient = call(layer, images)
    whole = block.factor_sums(images, gradient)
    laid_out: list[int] = []
    original = block.input_rows
    monkeypatch.setattr(block, "input_rows", lambda a, chosen=None: laid_out.append(len(a)) or original(a, chosen))
    one_example = 36 * (4 * 9 + 8) * 8
    monkeypatch.setattr(base, "TILE_BYTES", 2 * one_example)
    tiled = block.factor_sums(images, gradient)
    assert laid_out == [2, 2, 2, 1]
    torch.testing.assert_close(tiled.A, whole.A, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(tiled.G, whole.G, rtol=TOLERANCE, atol=TOLERANCE)


def test_channels_last_images_and_a_single_image() -> None:
    layer, block = conv(kernel_size=3, padding=1)
    images = gaussian(2, 4, 6, 6, seed=1)
    _, gradient = call(layer, images)
    plain = block.factor_sums(images, gradient)
    last = block.factor_sums(
        images.to(memory_format=torch.channels_last), gradient.to(memory_format=torch.channels_last)
    )
    torch.testing.assert_close(last.A, plain.A, rtol=TOLERANCE, atol=TOLERANCE)
    singles = [block.factor_sums(images[n], gradient[n]) for n in range(2)]
    torch.testing.assert_close(singles[0].A + singles[1].A, plain.A, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(singles[0].G + singles[1].G, plain.G, rtol=TOLERANCE, atol=TOLERANCE)


def test_wrong_shapes_are_named() -> None:
    _, block = conv(kernel_size=3)
    with pytest.raises(ValueError, match=r"block conv: activation has shape \(2, 5, 6, 6\), must be \[N, 4, H, W\]"):
        block.factor_sums(torch.zeros(2, 5, 6, 6), torch.zeros(2, 8, 4, 4))
    with pytest.raises(ValueError, match=r"output gradient has shape \(2, 8, 4, 5\), must be \(2, 8, 4, 4\)"):
        block.factor_sums(torch.zeros(2, 4, 6, 6), torch.zeros(2, 8, 4, 5))


def test_gradients_go_out_and_come_back() -> None:
    layer, block = conv(kernel_size=3, groups=2)
    layer = layer.to(memory_format=torch.channels_last)
    layer(gaussian(3, 4, 6, 6, seed=1)).pow(2).mean().backward()
    assert layer.weight.grad is not None and layer.bias is not None and layer.bias.grad is not None
    V = block.gradient()
    assert V.shape == (2, 4, 19)
    assert torch.equal(V[1, :, :-1], layer.weight.grad[4:].reshape(4, 18))
    assert torch.equal(V[1, :, -1], layer.bias.grad[4:])
    block.write_gradient(2 * V)
    assert torch.equal(block.gradient(), 2 * V)
