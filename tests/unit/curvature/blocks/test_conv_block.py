"""Convolution blocks against autograd and an independent im2col, in float64: C1, C2, C3 of algorithms.md."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.block_cases import CONVS, SPATIAL, assert_true_to_its_layer, block_of, call, multiplied
from tests.support.matrices import gaussian

TOLERANCE = 1e-11
"""Float64 sums of at most a few thousand products of numbers of size one."""

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "stride": {"kernel_size": (3, 2, 1), "stride": (2, 3, 2)},
    "padding": {"kernel_size": 3, "padding": (2, 1, 0)},
    "same": {"kernel_size": (2, 4, 3), "padding": "same", "dilation": (3, 1, 2)},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "dilation": {"kernel_size": 3, "padding": 2, "dilation": (2, 1, 2), "stride": 2},
    "groups": {"kernel_size": 3, "groups": 2, "padding": 1},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1, "stride": 2},
    "no-bias": {"kernel_size": 3, "bias": False, "groups": 2},
    "reflect": {"kernel_size": 3, "padding": (1, 2, 1), "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": 2, "padding_mode": "replicate", "stride": 2},
    "circular": {"kernel_size": 3, "padding": (2, 1, 2), "padding_mode": "circular", "groups": 2},
    "circular-same": {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
    "reflect-same": {"kernel_size": 4, "padding": "same", "padding_mode": "reflect"},
    "pointwise": {"kernel_size": 1},
}

# torch copies its input for an odd amount of "same" padding and says so.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

over_geometries = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
over_dims = pytest.mark.parametrize("dims", [1, 2, 3])


def conv(dims: int, **geometry: Any) -> nn.Module:
    """Makes a float64 convolution from 4 to 8 channels; tuples are cut to its dimensions."""
    torch.manual_seed(0)
    cut = {name: value[:dims] if isinstance(value, tuple) else value for name, value in geometry.items()}
    return CONVS[dims - 1](4, 8, dtype=torch.float64, **cut)


def padded_by_torch(layer: Any, images: Tensor) -> Tensor:
    """Returns patches `[N, C kernel, T]`, seen through a convolution that copies each channel's window."""
    volume = torch.Size(layer.kernel_size).numel()
    copying = type(layer)(
        4,
        4 * volume,
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
        copying.weight.copy_(torch.eye(volume).repeat(4, 1).reshape(copying.weight.shape))
        return copying(images).flatten(2)


@over_dims
@over_geometries
def test_c2_rows_rebuild_autograds_gradients(dims: int, geometry: dict[str, Any]) -> None:
    """C2: sum_t g_nt a_nt^T is the gradient of example n, which fixes patch order, stride, padding and dilation."""
    layer = conv(dims, **geometry)
    assert_true_to_its_layer(layer, gaussian(2, 4, *SPATIAL[:dims], seed=1), tolerance=TOLERANCE)


@over_dims
@over_geometries
def test_sums_equal_those_of_torchs_own_patches(dims: int, geometry: dict[str, Any]) -> None:
    layer = conv(dims, **geometry)
    block, images = block_of(layer), gaussian(2, 4, *SPATIAL[:dims], seed=1)
    _, _, gradient = call(layer, images)
    sums = block.factor_sums(multiplied(layer, images), gradient)
    patches = padded_by_torch(layer, images)
    n, _, positions = patches.shape
    c = block.shape.groups
    rows = patches.reshape(n, c, -1, positions).permute(1, 0, 3, 2).reshape(c, n * positions, -1)
    if block.has_bias:
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)
    out = gradient.reshape(n, c, -1, positions).permute(1, 0, 3, 2).reshape(c, n * positions, -1)
    torch.testing.assert_close(sums.A, rows.mT @ rows, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(sums.G, out.mT @ out, rtol=TOLERANCE, atol=TOLERANCE)
    assert sums.rows == n * positions and block.shape.convolution


ANY: dict[str, st.SearchStrategy[Any]] = {
    "dims": st.integers(1, 3),
    "kernel": st.tuples(*[st.integers(1, 4)] * 3),
    "stride": st.tuples(*[st.integers(1, 3)] * 3),
    "dilation": st.tuples(*[st.integers(1, 3)] * 3),
    "padding": st.one_of(st.tuples(*[st.integers(0, 3)] * 3), st.sampled_from(["same", "valid"])),
    "mode": st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    "groups": st.sampled_from([1, 2, 4]),
    "bias": st.booleans(),
}


def is_true_to_torch(
    dims: int, kernel: Any, stride: Any, dilation: Any, padding: Any, mode: str, groups: int, bias: bool
) -> None:
    layer = conv(
        dims,
        kernel_size=kernel,
        stride=1 if padding == "same" else stride,
        dilation=dilation,
        padding=padding,
        padding_mode=mode,
        groups=groups,
        bias=bias,
    )
    images = gaussian(2, 4, *(8, 7, 5)[:dims], seed=1)
    try:
        layer(images)
    except RuntimeError:
        assume(False)  # the kernel is larger than the image
    assert_true_to_its_layer(layer, images, tolerance=10 * TOLERANCE)


@given(**ANY)
@settings(max_examples=20)
def test_any_geometry_that_torch_takes(**geometry: Any) -> None:
    is_true_to_torch(**geometry)


@pytest.mark.slow
@given(**ANY)
@settings(max_examples=100)
def test_any_of_many_geometries(**geometry: Any) -> None:
    is_true_to_torch(**geometry)


@over_dims
def test_c1_a_pointwise_kernel_on_one_pixel_is_a_linear_layer(dims: int) -> None:
    block, linear = block_of(conv(dims, kernel_size=1)), block_of(nn.Linear(4, 8, dtype=torch.float64))
    a, g, pixel = gaussian(5, 4, seed=1), gaussian(5, 8, seed=2), (1,) * dims
    as_conv, as_linear = block.factor_sums(a.view(5, 4, *pixel), g.view(5, 8, *pixel)), linear.factor_sums(a, g)
    for name in ("A", "G", "a", "g"):
        found, expected = getattr(as_conv, name), getattr(as_linear, name)
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert as_conv.rows == as_linear.rows == 5
    assert (block.shape.d_out, block.shape.d_in) == (linear.shape.d_out, linear.shape.d_in)


@over_dims
@pytest.mark.parametrize("groups", [2, 4])
def test_c3_groups_are_separate_convolutions(dims: int, groups: int) -> None:
    layer = conv(dims, kernel_size=3, groups=groups, padding=1, stride=2)
    images = gaussian(3, 4, *SPATIAL[:dims], seed=1)
    _, _, gradient = call(layer, images)
    together = block_of(layer).factor_sums(images, gradient)
    for j in range(groups):
        alone = CONVS[dims - 1](4 // groups, 8 // groups, 3, padding=1, stride=2, dtype=torch.float64)
        part = block_of(alone).factor_sums(images.chunk(groups, 1)[j], gradient.chunk(groups, 1)[j])
        for name in ("A", "G", "a", "g"):
            found, expected = getattr(together, name)[j], getattr(part, name)[0]
            torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
        assert together.rows == part.rows


@over_dims
def test_channels_last_images_and_a_single_image(dims: int) -> None:
    layer = conv(dims, kernel_size=3, padding=1)
    block, images = block_of(layer), gaussian(2, 4, *SPATIAL[:dims], seed=1)
    _, _, gradient = call(layer, images)
    plain = block.factor_sums(images, gradient)
    last = block.factor_sums(images.movedim(1, -1).contiguous().movedim(-1, 1), gradient)
    torch.testing.assert_close(last.A, plain.A, rtol=TOLERANCE, atol=TOLERANCE)
    singles = [block.factor_sums(images[n], gradient[n]) for n in range(2)]
    torch.testing.assert_close(singles[0].A + singles[1].A, plain.A, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(singles[0].G + singles[1].G, plain.G, rtol=TOLERANCE, atol=TOLERANCE)


def test_wrong_shapes_are_named() -> None:
    block = block_of(conv(2, kernel_size=3))
    with pytest.raises(ValueError, match=r"block layer: activation has shape \(2, 5, 6, 6\), must be \[N, 4, H, W\]"):
        block.factor_sums(torch.zeros(2, 5, 6, 6), torch.zeros(2, 8, 4, 4))
    with pytest.raises(ValueError, match=r"output gradient has shape \(2, 8, 4, 5\), must be \(2, 8, 4, 4\)"):
        block.factor_sums(torch.zeros(2, 4, 6, 6), torch.zeros(2, 8, 4, 5))
    with pytest.raises(ValueError, match=r"must be \[N, 4, W\]"):
        block_of(conv(1, kernel_size=3)).factor_sums(torch.zeros(2, 4, 6, 6), torch.zeros(2, 8, 4, 4))
    with pytest.raises(ValueError, match=r"must be \[N, 4, D, H, W\]"):
        block_of(conv(3, kernel_size=3)).factor_sums(torch.zeros(2, 4, 6, 6), torch.zeros(2, 8, 4, 4))


def test_gradients_go_out_and_come_back() -> None:
    layer: Any = conv(2, kernel_size=3, groups=2).to(memory_format=torch.channels_last)
    block = block_of(layer)
    layer(gaussian(3, 4, 6, 6, seed=1)).pow(2).mean().backward()
    V = block.gradient()
    assert V.shape == (2, 4, 19)
    assert torch.equal(V[1, :, :-1], layer.weight.grad[4:].reshape(4, 18))
    assert torch.equal(V[1, :, -1], layer.bias.grad[4:])
    block.write_gradient(2 * V)
    assert torch.equal(block.gradient(), 2 * V)
