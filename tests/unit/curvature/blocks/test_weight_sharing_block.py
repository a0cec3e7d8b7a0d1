"""`expand` and `reduce` of linear layers over sequences: each exact for a deep linear net in its own setting (7.9)."""

import pytest
import torch
from torch import Tensor, nn

from kfdist.curvature.blocks import Block
from kfdist.curvature.references import dense_kronecker, empirical_fisher, per_example_gradients
from tests.support.block_cases import block_of
from tests.support.matrices import gaussian, relative_error

TOLERANCE = 1e-10
"""Float64 sums of a few hundred products of numbers of size one, as algorithms.md asks."""

N, R = 5, 4


def deep_linear() -> nn.Sequential:
    torch.manual_seed(0)
    sizes = ((3, 4), (4, 3), (3, 2))
    return nn.Sequential(*[nn.Linear(q, p, dtype=torch.float64) for q, p in sizes])


def factors_and_truth(layer: int, sharing: str, *, pooled: bool) -> tuple[Block, Tensor, Tensor]:
    """Measures one layer as a step would, for every output of the net with the derivative 1 of its own.

    The Fisher block of half the squared error is the sum over outputs k of vec(J_k) vec(J_k)^T, J_k = dy_k/dW: outputs
    are those of every position, or of the mean over positions where they are `pooled`; the mean over examples.

    Returns:
        The block, Omega (x) Gamma, and the dense Fisher block.
    """
    net = deep_linear()
    block = block_of(net[layer], sharing)
    inputs = gaussian(N, R, 3, seed=1) + 1.0
    a = net[:layer](inputs).detach()
    y = net[layer](a)
    output = net[layer + 1 :](y)
    outputs = output.mean(1) if pooled else output
    A, G, fisher = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for k in range(2):
        (g,) = torch.autograd.grad(outputs[..., k].sum(), y, retain_graph=True)
        sums = block.factor_sums(a, g)
        A, G = sums.A / N, G + sums.G / sums.rows
        single = per_example_gradients(block, outputs[..., k].flatten())
        fisher = fisher + empirical_fisher(single) * (len(single) / N)
    return block, dense_kronecker(A, G), fisher


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize(("sharing", "pooled"), [("expand", False), ("reduce", True)])
def test_each_sharing_is_exact_in_its_setting(layer: int, sharing: str, pooled: bool) -> None:
    _, found, truth = factors_and_truth(layer, sharing, pooled=pooled)
    assert relative_error(found, truth) < TOLERANCE


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize(("sharing", "pooled"), [("expand", True), ("reduce", False)])
def test_neither_is_exact_in_the_others(layer: int, sharing: str, pooled: bool) -> None:
    _, found, truth = factors_and_truth(layer, sharing, pooled=pooled)
    assert relative_error(found, truth) > 0.2


@pytest.mark.parametrize("shape", [(N,), (N, 1)])
def test_one_position_is_kfac(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(4, 3, dtype=torch.float64)
    a, g = gaussian(*shape, 4, seed=1), gaussian(*shape, 3, seed=2)
    plain = block_of(layer).factor_sums(a, g)
    reduced = block_of(layer, "reduce").factor_sums(a, g)
    assert reduced.rows == plain.rows == N
    for name in ("A", "G", "a", "g"):
        assert torch.equal(getattr(reduced, name), getattr(plain, name))


def test_reduced_rows_are_means_of_inputs_and_sums_of_gradients() -> None:
    """The sums are those over `factor_rows`; `example_rows` keeps every position, and with it the true gradient."""
    layer = nn.Linear(4, 3, dtype=torch.float64)
    block = block_of(layer, "reduce")
    inputs = gaussian(N, 2, 3, 4, seed=1)  # two dimensions of positions
    y = layer(inputs)
    losses = y.pow(2).flatten(1).sum(1)
    (gradient,) = torch.autograd.grad(losses.sum(), y, retain_graph=True)
    a, g = block.factor_rows(inputs, gradient)
    assert a.shape == (1, N, 1, 5) and g.shape == (1, N, 1, 3)
    assert torch.equal(a[0, :, 0, 4], torch.ones(N).double())
    torch.testing.assert_close(a[0, :, 0, :4], inputs.mean((1, 2)), rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(g[0, :, 0], gradient.sum((1, 2)), rtol=TOLERANCE, atol=TOLERANCE)
    batched = block.batched(inputs, gradient)
    assert block.positions(*batched) == 1
    sums = block.factor_sums(*batched)  # what is batched already is taken again
    a, g = a[0, :, 0], g[0, :, 0]
    for found, expected in ((sums.A, a.T @ a), (sums.G, g.T @ g), (sums.a, a.sum(0)), (sums.g, g.sum(0))):
        torch.testing.assert_close(found[0], expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert sums.rows == N
    a, g = block.example_rows(inputs, gradient)
    assert a.shape == (1, N, 6, 5)
    expected = per_example_gradients(block, losses)
    torch.testing.assert_close((g.mT @ a).transpose(0, 1), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_reduce_uses_every_position_whatever_the_budget() -> None:
    block = block_of(nn.Linear(4, 3, dtype=torch.float64), "reduce")
    a, g = gaussian(N, R, 4, seed=1), gaussian(N, R, 3, seed=2)
    whole = block.factor_sums(a, g)
    sampled = block.factor_sums(a, g, positions_fraction=0.5, most_positions=1, seed=3)
    assert torch.equal(sampled.A, whole.A) and torch.equal(sampled.G, whole.G)


def test_low_precision_is_pooled_in_float32() -> None:
    """4096 ones in bfloat16 add up to 256 in bfloat16, where one more is lost."""
    block = block_of(nn.Linear(4, 3), "reduce")
    a, g = torch.ones(1, 4096, 4).bfloat16(), torch.ones(1, 4096, 3).bfloat16()
    sums = block.factor_sums(a, g)
    assert torch.equal(sums.A, torch.ones(1, 5, 5)) and torch.equal(sums.g, torch.full((1, 3), 4096.0))


def test_convolutions_always_expand() -> None:
    layer = nn.Conv1d(2, 3, 2, dtype=torch.float64)
    images, g = gaussian(N, 2, 5, seed=1), gaussian(N, 3, 4, seed=2)
    assert torch.equal(block_of(layer, "reduce").factor_sums(images, g).A, block_of(layer).factor_sums(images, g).A)
