"""Fully connected blocks: sums, sub-sampling of positions, precision, gradients."""

import itertools

import pytest
import torch
from torch import nn

from kfdist.curvature.blocks import Block
from kfdist.curvature.blocks.rows import draw_positions
from tests.support.block_cases import make_block
from tests.support.matrices import gaussian, relative_error

TOLERANCE = 1e-12
"""Float64 sums of a few dozen products of numbers of size one."""


def linear(bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, Block]:
    torch.manual_seed(0)
    layer = nn.Linear(5, 3, bias=bias, dtype=dtype)
    block = make_block("fc", layer)
    assert isinstance(block, Block)
    return layer, block


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("positions", [(), (4,), (2, 3)])
def test_sums_run_over_examples_and_positions(bias: bool, positions: tuple[int, ...]) -> None:
    _, block = linear(bias)
    a, g = gaussian(6, *positions, 5, seed=1), gaussian(6, *positions, 3, seed=2)
    sums = block.factor_sums(a, g)
    rows = a.reshape(-1, 5)
    if bias:
        rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    torch.testing.assert_close(sums.A[0], rows.T @ rows, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(sums.G[0], g.reshape(-1, 3).T @ g.reshape(-1, 3), rtol=TOLERANCE, atol=TOLERANCE)
    assert sums.rows == len(rows)


def test_no_examples_give_zero_and_one_vector_is_one_example() -> None:
    _, block = linear()
    none = block.factor_sums(torch.zeros(0, 5).double(), torch.zeros(0, 3).double())
    assert none.rows == 0 and none.A.abs().sum() == 0 and none.G.abs().sum() == 0
    one = block.factor_sums(torch.ones(5).double(), torch.ones(3).double())
    assert one.rows == 1 and torch.equal(one.A, torch.ones(1, 6, 6).double())


def test_position_samples_average_to_the_whole() -> None:
    """Unbiased: over all equally likely draws of 2 of 4 positions the mean of the sums is the sum over all."""
    _, block = linear()
    a, g = gaussian(6, 4, 5, seed=1), gaussian(6, 4, 3, seed=2)
    whole = block.factor_sums(a, g)
    by_draw: dict[tuple[int, ...], torch.Tensor] = {}
    for seed in range(200):
        drawn = draw_positions(4, 0.5, seed)
        assert drawn is not None
        sample = block.factor_sums(a, g, positions_fraction=0.5, seed=seed)
        assert sample.rows == whole.rows
        by_draw[tuple(drawn.tolist())] = torch.cat([sample.A.flatten(), sample.G.flatten()])
    assert set(by_draw) == set(itertools.combinations(range(4), 2))
    mean = torch.stack(list(by_draw.values())).mean(0)
    expected = torch.cat([whole.A.flatten(), whole.G.flatten()])
    torch.testing.assert_close(mean, expected, rtol=TOLERANCE, atol=10 * TOLERANCE)


def test_convolutions_sample_the_same_way() -> None:
    layer = nn.Conv2d(2, 4, 2, groups=2, dtype=torch.float64)
    block = make_block("conv", layer)
    assert isinstance(block, Block)
    images, gradient = gaussian(3, 2, 3, 3, seed=1), gaussian(3, 4, 2, 2, seed=2)
    whole = block.factor_sums(images, gradient)
    by_draw = {}
    for seed in range(60):
        drawn = draw_positions(4, 0.25, seed)
        assert drawn is not None
        by_draw[int(drawn)] = block.factor_sums(images, gradient, positions_fraction=0.25, seed=seed)
    assert set(by_draw) == {0, 1, 2, 3}
    assert relative_error(sum(s.A for s in by_draw.values()) / 4, whole.A) < TOLERANCE  # type: ignore[arg-type]
    assert relative_error(sum(s.G for s in by_draw.values()) / 4, whole.G) < TOLERANCE  # type: ignore[arg-type]


@pytest.mark.parametrize(("fraction", "most", "used"), [(1.0, 3, 3), (0.5, 3, 2), (0.75, 2, 2), (1.0, 9, 4)])
def test_the_smaller_budget_of_positions_decides(fraction: float, most: int, used: int) -> None:
    """With every row of a the same, T/T' times their sum over T' positions is the sum over all T."""
    drawn = draw_positions(4, fraction, 0, most)
    assert (4 if drawn is None else len(drawn)) == used
    _, block = linear()
    a, g = torch.ones(6, 4, 5).double(), gaussian(6, 4, 3, seed=2)
    sums = block.factor_sums(a, g, positions_fraction=fraction, most_positions=most, seed=0)
    assert sums.rows == 24
    kept = g if drawn is None else g[:, drawn]
    torch.testing.assert_close(sums.A, torch.full((1, 6, 6), 24.0).double(), rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(sums.a, torch.full((1, 6), 24.0).double(), rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(sums.g[0], kept.sum((0, 1)) * 4 / used, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(
        sums.G[0], torch.einsum("ntp,ntr->pr", kept, kept) * 4 / used, rtol=TOLERANCE, atol=TOLERANCE
    )


def test_an_empty_budget_of_positions_is_refused() -> None:
    _, block = linear()
    with pytest.raises(ValueError, match="most_positions is 0, must be at least 1"):
        block.factor_sums(torch.zeros(2, 5), torch.zeros(2, 3), most_positions=0)


def test_draws_depend_on_the_seed_alone() -> None:
    first = draw_positions(100, 0.3, 5)
    torch.manual_seed(9)
    second = draw_positions(100, 0.3, 5)
    assert first is not None and second is not None and torch.equal(first, second)
    assert len(first) == 30 and bool((first.diff() > 0).all())
    # Pinned: another process, machine or release must draw the same positions.
    pinned = draw_positions(10, 0.4, 0)
    assert pinned is not None and pinned.tolist() == PINNED_DRAW
    assert draw_positions(100, 1.0, 5) is None
    assert draw_positions(1, 0.01, 5) is None


PINNED_DRAW = [1, 4, 5, 7]


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_fractions_outside_their_range_are_refused(fraction: float) -> None:
    _, block = linear()
    with pytest.raises(ValueError, match=r"positions_fraction is .*, must be in \(0, 1\]"):
        block.factor_sums(torch.zeros(2, 5), torch.zeros(2, 3), positions_fraction=fraction)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_multiplied_in_float32(dtype: torch.dtype) -> None:
    """300^2 x 64 rows overflows float16; also with autocast on."""
    _, block = linear()
    a, g = torch.full((64, 5), 300.0, dtype=dtype), torch.full((64, 3), 2.0**-14, dtype=dtype)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            sums = block.factor_sums(a, g)
        assert sums.A.dtype == sums.G.dtype == torch.float32
        assert torch.equal(sums.A[0, :5, :5], torch.full((5, 5), 64 * 300.0**2))
        assert torch.equal(sums.G[0], torch.full((3, 3), 64 * 2.0**-28))


def test_wrong_shapes_are_named() -> None:
    _, block = linear()
    with pytest.raises(ValueError, match=r"block fc: activation has shape \(2, 4\), must be \[N, \.\.\., 5\]"):
        block.factor_sums(torch.zeros(2, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="differ in examples or positions"):
        block.factor_sums(torch.zeros(2, 5), torch.zeros(3, 3))


def test_gradients_go_out_and_come_back() -> None:
    layer, block = linear(dtype=torch.bfloat16)
    layer(torch.ones(2, 5, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad is not None and layer.bias.grad is not None
    V = block.gradient()
    assert V.dtype == torch.float32 and V.shape == (1, 3, 6)
    kept = layer.weight.grad
    block.write_gradient(3 * V)
    assert layer.weight.grad is kept and kept.dtype == torch.bfloat16
    assert torch.equal(layer.bias.grad, torch.full((3,), 6.0, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"direction has shape \(1, 3, 5\), must be \(1, 3, 6\)"):
        block.write_gradient(V[..., :-1])


def test_a_missing_gradient_is_named() -> None:
    layer, block = linear()
    with pytest.raises(ValueError, match=r"block fc: its weight has no gradient; call backward\(\)"):
        block.gradient()
    layer.weight.grad = torch.zeros_like(layer.weight)
    with pytest.raises(ValueError, match="block fc: its bias has no gradient"):
        block.write_gradient(torch.zeros(1, 3, 6))
