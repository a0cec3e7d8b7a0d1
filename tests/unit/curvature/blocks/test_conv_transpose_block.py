"""Blocks of transposed convolutions: the convolution of an input spread by zeros, in float64 (C1, C2, C3)."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from kfdist.types import BlockShape
from tests.support.block_cases import TRANSPOSED, assert_true_to_its_layer, block_of, call
from tests.support.matrices import gaussian

TOLERANCE = 1e-11
"""Float64 sums of at most a few thousand products of numbers of size one."""

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "stride": {"kernel_size": (3, 2, 2), "stride": (2, 3, 2)},
    "output-padding": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "wide-output-padding": {"kernel_size": 2, "dilation": 3, "output_padding": (2, 1, 0)},
    "cut": {"kernel_size": 2, "stride": 2, "padding": (1, 2, 1)},
    "dilation": {"kernel_size": 3, "dilation": (2, 1, 2), "stride": 2, "padding": 1},
    "gaps": {"kernel_size": 1, "stride": 2},
    "groups": {"kernel_size": 3, "groups": 2, "stride": 2},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1},
    "no-bias": {"kernel_size": 3, "bias": False, "groups": 2, "stride": 2},
    "pointwise": {"kernel_size": 1},
}

over_dims = pytest.mark.parametrize("dims", [1, 2, 3])


def transposed(dims: int, **geometry: Any) -> nn.Module:
    """Makes a float64 layer from 4 to 8 channels; tuples are cut to its dimensions."""
    torch.manual_seed(0)
    cut = {name: value[:dims] if isinstance(value, tuple) else value for name, value in geometry.items()}
    return TRANSPOSED[dims - 1](4, 8, dtype=torch.float64, **cut)


@over_dims
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_c2_rows_rebuild_outputs_and_gradients(dims: int, geometry: dict[str, Any]) -> None:
    layer = transposed(dims, **geometry)
    assert_true_to_its_layer(layer, gaussian(2, 4, *(5, 4, 3)[:dims], seed=1), tolerance=TOLERANCE)


ANY: dict[str, st.SearchStrategy[Any]] = {
    "dims": st.integers(1, 3),
    "kernel": st.tuples(*[st.integers(1, 4)] * 3),
    "stride": st.tuples(*[st.integers(1, 3)] * 3),
    "dilation": st.tuples(*[st.integers(1, 3)] * 3),
    "padding": st.tuples(*[st.integers(0, 3)] * 3),
    "output_padding": st.tuples(*[st.integers(0, 2)] * 3),
    "groups": st.sampled_from([1, 2, 4]),
    "bias": st.booleans(),
}


def is_true_to_torch(dims: int, **geometry: Any) -> None:
    geometry["kernel_size"] = geometry.pop("kernel")
    layer = transposed(dims, **geometry)
    images = gaussian(2, 4, *(4, 3, 3)[:dims], seed=1)
    try:
        layer(images)
    except RuntimeError:
        assume(False)  # no output is left, or more output padding than stride and dilation allow
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


def test_an_output_size_chosen_by_the_caller() -> None:
    """`output_size` overrules the layer's output padding, so the output's size isn't a function of the input's."""
    layer = transposed(2, kernel_size=3, stride=2, padding=1)
    images = gaussian(2, 4, 4, 3, seed=1)
    for size in ((7, 5), (8, 5), (8, 6)):
        assert_true_to_its_layer(layer, images, tolerance=TOLERANCE, output_size=size)
    assert block_of(layer).positions(images) == 7 * 5
    with pytest.raises(ValueError, match=r"output gradient has shape \(2, 8, 9, 5\), must be \(2, 8, 7, 5\)"):
        block_of(layer).factor_sums(images, torch.zeros(2, 8, 9, 5))


@over_dims
def test_c1_a_pointwise_kernel_on_one_pixel_is_a_linear_layer(dims: int) -> None:
    block, linear = block_of(transposed(dims, kernel_size=1)), block_of(nn.Linear(4, 8, dtype=torch.float64))
    a, g, pixel = gaussian(5, 4, seed=1), gaussian(5, 8, seed=2), (1,) * dims
    found, expected = block.factor_sums(a.view(5, 4, *pixel), g.view(5, 8, *pixel)), linear.factor_sums(a, g)
    torch.testing.assert_close(found.A, expected.A, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(found.G, expected.G, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("groups", [2, 4])
def test_c3_groups_are_separate_layers(groups: int) -> None:
    layer = transposed(2, kernel_size=3, groups=groups, stride=2)
    images = gaussian(3, 4, 4, 3, seed=1)
    _, _, gradient = call(layer, images)
    together = block_of(layer).factor_sums(images, gradient)
    for j in range(groups):
        alone = nn.ConvTranspose2d(4 // groups, 8 // groups, 3, stride=2, dtype=torch.float64)
        part = block_of(alone).factor_sums(images.chunk(groups, 1)[j], gradient.chunk(groups, 1)[j])
        torch.testing.assert_close(together.A[j], part.A[0], rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(together.G[j], part.G[0], rtol=TOLERANCE, atol=TOLERANCE)


def test_stride_one_is_a_convolution_with_the_kernel_turned_round() -> None:
    """The same rows, and the same matrix, as the convolution with full padding that torch computes the same with."""
    layer: Any = transposed(2, kernel_size=(3, 2))
    plain = nn.Conv2d(4, 8, (3, 2), padding=(2, 1), dtype=torch.float64)
    with torch.no_grad():
        plain.weight.copy_(layer.weight.flip(-2, -1).transpose(0, 1))
        plain.bias.copy_(layer.bias)  # type: ignore[union-attr]
    images = gaussian(2, 4, 5, 4, seed=1)
    output, _, gradient = call(layer, images)
    torch.testing.assert_close(plain(images), output, rtol=TOLERANCE, atol=TOLERANCE)
    ours, theirs = block_of(layer), block_of(plain)
    assert torch.equal(ours.to_matrix(ours.parameters()), theirs.to_matrix(theirs.parameters()))
    torch.testing.assert_close(
        ours.factor_sums(images, gradient).A, theirs.factor_sums(images, gradient).A, rtol=TOLERANCE, atol=TOLERANCE
    )


def test_its_shape_is_that_of_a_convolution_and_a_single_image_is_taken() -> None:
    layer = transposed(2, kernel_size=3, groups=2, stride=2)
    block, images = block_of(layer), gaussian(1, 4, 4, 3, seed=1)
    assert block.shape == BlockShape(d_out=4, d_in=2 * 9 + 1, groups=2, convolution=True)
    _, _, gradient = call(layer, images)
    assert torch.equal(block.factor_sums(images[0], gradient[0]).A, block.factor_sums(images, gradient).A)


def test_gradients_go_out_and_come_back() -> None:
    layer: Any = transposed(2, kernel_size=3, groups=2, stride=2)
    block = block_of(layer)
    layer(gaussian(3, 4, 4, 3, seed=1)).pow(2).mean().backward()
    weight, bias = layer.weight.grad.clone(), layer.bias.grad.clone()
    V = block.gradient()
    assert torch.equal(V[1, :, -1], bias[4:])
    assert torch.equal(V[1, 2, 9:18], weight[3, 2].flip(0, 1).flatten())  # group 1, its output 2, its input 1
    block.write_gradient(3 * V)
    assert torch.equal(layer.weight.grad, 3 * weight) and torch.equal(layer.bias.grad, 3 * bias)
