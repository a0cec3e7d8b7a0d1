"""K-FAC and KFC against the dense Fisher matrix in float64: K1, K2, K3, K7 and C4 of algorithms.md."""

import pytest
import torch
from torch import nn

from kfdist.curvature.blocks import Block
from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.references import (
    damping_shares,
    dense_kronecker,
    empirical_fisher,
    per_example_gradients,
    softmax_fisher,
    solve_dense,
    solve_factored_dense,
)
from kfdist.curvature.statistics import KroneckerFactors
from tests.support.block_cases import block_of, make_block
from tests.support.inversions import invert_with_ladder
from tests.support.matrices import gaussian, make_factors, relative_error

TOLERANCE = 1e-10
"""Dense float64 solves with condition numbers up to 1e4, as algorithms.md asks (K1: 1e-12)."""

DAMPING = 1e-2


def preconditioner(factors: KroneckerFactors, method: str, **settings: object) -> AbstractPreconditioner:
    inverter = make_inverter(method, **settings)
    outcome = invert_with_ladder(inverter, factors, damping=DAMPING, previous={}, seed=0)
    assert outcome.preconditioner is not None, outcome.reason
    return outcome.preconditioner


def captured(layer: nn.Module, block: Block, inputs: torch.Tensor, losses_of) -> tuple[KroneckerFactors, torch.Tensor]:
    """Omega and Gamma of one batch as `statistics` defines them, and the per-example losses."""
    output = layer(inputs)
    losses = losses_of(output)
    (gradient,) = torch.autograd.grad(losses.sum(), output, retain_graph=True)
    sums = block.factor_sums(inputs, gradient)
    return KroneckerFactors(A=sums.A / len(inputs), G=sums.G / sums.rows), losses


def linear() -> tuple[nn.Linear, Block]:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.float64)
    block = make_block("fc", layer)
    assert isinstance(block, Block)
    return layer, block


def test_k1_one_example_is_exact() -> None:
    """K1: with one example and every class enumerated, A (x) G is the Fisher block itself."""
    layer, block = linear()
    inputs = gaussian(1, 4, seed=1)
    logits = layer(inputs)
    probabilities = torch.softmax(logits, -1).detach()[0]
    A, G = torch.zeros(1, 5, 5).double(), torch.zeros(1, 3, 3).double()
    for label in range(3):
        log_probability = torch.log_softmax(logits, -1)[:, label]
        (gradient,) = torch.autograd.grad(log_probability.sum(), logits, retain_graph=True)
        sums = block.factor_sums(inputs, gradient * probabilities[label].sqrt())
        A, G = sums.A, G + sums.G
    assert relative_error(dense_kronecker(A, G), softmax_fisher(block, logits)) < 1e-12


def test_one_example_is_exact_for_the_empirical_fisher_and_a_one_position_convolution() -> None:
    layer = nn.Conv2d(2, 4, 3, groups=2, dtype=torch.float64)
    block = make_block("conv", layer)
    assert isinstance(block, Block)
    factors, losses = captured(layer, block, gaussian(1, 2, 3, 3, seed=1), lambda o: o.pow(2).flatten(1).sum(1))
    fisher = empirical_fisher(per_example_gradients(block, losses))
    assert relative_error(dense_kronecker(factors.A, factors.G), fisher) < 1e-12


@pytest.mark.parametrize("spectrum", ["well-conditioned", "decaying", "singular"])
def test_k2_joint_damping_solves_the_damped_product(spectrum: str) -> None:
    """K2: the eigenbasis gives (A (x) G + lambda I)^{-1} V, the factored form (A~ (x) G~)^{-1} V."""
    factors = make_factors(spectrum, torch.float64)
    V = gaussian(2, 7, 12, seed=3)
    exact = solve_dense(dense_kronecker(factors.A, factors.G), DAMPING, V)
    assert relative_error(preconditioner(factors, "kfac-eigen").apply(V, DAMPING), exact) < TOLERANCE
    shares = damping_shares(factors.A, factors.G, rule="pi", damping=DAMPING)
    factored = solve_factored_dense(factors.A, factors.G, shares, V)
    assert relative_error(preconditioner(factors, "kfac").apply(V, DAMPING), factored) < TOLERANCE


def test_damping_can_change_without_a_new_inversion() -> None:
    factors, V = make_factors("decaying", torch.float64), gaussian(2, 7, 12, seed=3)
    made = preconditioner(factors, "kfac-eigen")
    for damping in (1e-4, 1.0):
        expected = solve_dense(dense_kronecker(factors.A, factors.G), damping, V)
        assert relative_error(made.apply(V, damping), expected) < TOLERANCE


@pytest.mark.parametrize("method", ["kfac", "kfac-eigen", "rs-kfac"])
@pytest.mark.parametrize("scale", [1e-5, 7.0, 1e4])
def test_k3_directions_ignore_how_scale_is_split(method: str, scale: float) -> None:
    """K3: A -> c A, G -> G/c leaves the direction as it was."""
    factors, V = make_factors("decaying", torch.float64), gaussian(2, 7, 12, seed=3)
    moved = KroneckerFactors(A=factors.A * scale, G=factors.G / scale)
    expected = preconditioner(factors, method).apply(V, DAMPING)
    assert relative_error(preconditioner(moved, method).apply(V, DAMPING), expected) < TOLERANCE


@pytest.mark.parametrize("learning_rate", [0.5, 1e-4])
def test_k7_the_clipped_step_attains_the_bound(learning_rate: float) -> None:
    """K7: nu = min(1, sqrt(kappa / (lr^2 sum <U, V>))) makes the step's quadratic form kappa where it is below 1."""
    kappa, total, dense_total = 1e-3, torch.zeros(()).double(), 0.0
    for spectrum, seed in (("decaying", 3), ("singular", 4)):
        factors, V = make_factors(spectrum, torch.float64), gaussian(2, 7, 12, seed=seed)
        total = total + (preconditioner(factors, "kfac-eigen").apply(V, DAMPING) * V).sum()
        damped = dense_kronecker(factors.A, factors.G) + DAMPING * torch.eye(84, dtype=torch.float64)
        dense_total += float((V.flatten(1) * torch.linalg.solve(damped, V.flatten(1))).sum())
    nu = min(1.0, (kappa / (learning_rate**2 * float(total))) ** 0.5)
    step = (learning_rate * nu) ** 2 * dense_total
    assert step == pytest.approx(kappa, rel=TOLERANCE) if nu < 1 else step < kappa
    assert (nu < 1) == (learning_rate == 0.5)


def test_c5_updates_ignore_an_affine_change_of_the_inputs() -> None:
    """C5: without damping, the layer's output moves the same way in whatever affine coordinates its inputs come."""
    _, block = linear()
    a, g = gaussian(40, 4, seed=1), gaussian(40, 3, seed=2)
    change, shift = gaussian(4, 4, seed=3), gaussian(4, seed=4)
    moves = [undamped_move(block, inputs, g) for inputs in (a, a @ change + shift)]
    assert relative_error(moves[1], moves[0]) < TOLERANCE


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_c5_updates_of_convolutions_ignore_an_affine_change_of_the_channels(kind: type[nn.Module], groups: int) -> None:
    """C5: with a bias and without padding (padded zeros don't change with the channels) the same holds for patches.

    Channels are mixed inside their group only: a mixture of groups is no grouped convolution.
    """
    block = block_of(kind(4, 6, 2, groups=groups, dtype=torch.float64))
    dims = block.input_features - 1
    images, g = gaussian(12, 4, *(4,) * dims, seed=1), gaussian(12, 6, *(3,) * dims, seed=2)
    change, shift = gaussian(groups, 4 // groups, 4 // groups, seed=3), gaussian(4, *(1,) * dims, seed=4)
    mixed = torch.einsum("gij,ngj...->ngi...", change, images.unflatten(1, (groups, -1))).flatten(1, 2)
    moves = [undamped_move(block, inputs, g) for inputs in (images, mixed + shift)]
    assert relative_error(moves[1], moves[0]) < TOLERANCE


@pytest.mark.parametrize("groups", [1, 2])
def test_updates_of_transposed_convolutions_ignore_a_linear_change_of_the_channels(groups: int) -> None:
    """Linear only: the zeros between the pixels stay zeros, so a shift is no affine change of the rows."""
    block = block_of(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=groups, dtype=torch.float64))
    images, g = gaussian(12, 4, 4, 4, seed=1), gaussian(12, 6, 9, 9, seed=2)
    change = gaussian(groups, 4 // groups, 4 // groups, seed=3)
    mixed = torch.einsum("gij,ngj...->ngi...", change, images.unflatten(1, (groups, -1))).flatten(1, 2)
    moves = [undamped_move(block, inputs, g) for inputs in (images, mixed)]
    assert relative_error(moves[1], moves[0]) < TOLERANCE


def undamped_move(block: Block, inputs: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Returns how the layer's output moves at every position under its direction, with next to no damping."""
    sums = block.factor_sums(inputs, g)
    factors = KroneckerFactors(A=sums.A / len(inputs), G=sums.G / sums.rows)
    rows, out = (each.flatten(1, 2) for each in block.example_rows(inputs, g))
    direction = preconditioner(factors, "kfac-eigen").apply(out.mT @ rows / len(inputs), 1e-16)
    return rows @ direction.mT


LAST_LAYERS = {
    "conv2d": nn.Conv2d(2, 4, 3, stride=2, padding=1, dtype=torch.float64),
    "conv2d-groups": nn.Conv2d(2, 4, 2, groups=2, dtype=torch.float64),
    "conv-transpose1d": nn.ConvTranspose1d(2, 4, 4, stride=2, padding=1, dtype=torch.float64),
    "conv-transpose2d": nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1, dtype=torch.float64),
    "conv-transpose2d-groups": nn.ConvTranspose2d(2, 4, 3, groups=2, dtype=torch.float64),
}


@pytest.mark.parametrize("name", LAST_LAYERS)
def test_a_last_layer_under_a_squared_error_is_exact(name: str) -> None:
    """KFC's assumptions hold there: every output has the derivative 1 of its own, uncorrelated and alike everywhere.

    The Fisher block of half the squared error is (1/N) sum_n over all outputs y of vec(dy/dW) vec(dy/dW)^T.
    """
    layer = LAST_LAYERS[name]
    block, images = block_of(layer), gaussian(2, 2, *(3, 4)[: block_of(layer).input_features - 1], seed=1)
    A, G, fisher = last_layer_factors(layer, block, images)
    assert relative_error(dense_kronecker(A, G), fisher) < TOLERANCE


def test_a_transposed_convolution_with_swapped_roles_would_not_be() -> None:
    """Rows of pixels and of patches of the output gradient (algorithms.md 2.1) drop what overlapping patches share."""
    layer = nn.ConvTranspose2d(2, 3, 4, stride=2, padding=1, bias=False, dtype=torch.float64)
    block, images = block_of(layer), gaussian(2, 2, 3, 4, seed=1).relu()
    A, G, fisher = last_layer_factors(layer, block, images)
    assert relative_error(dense_kronecker(A, G), fisher) < TOLERANCE
    output = layer(images)
    per_output = []
    G = torch.zeros(48, 48).double()
    for each in torch.eye(output[0].numel()).double().reshape(-1, *output.shape[1:]):
        parts = [torch.autograd.grad((y * each).sum(), layer.weight, retain_graph=True)[0] for y in output]
        per_output.append(torch.stack(parts)[:, None].flatten(3))  # [N, 1, C_in, C_out kernel]
        patches = torch.nn.functional.unfold(each[None], 4, padding=1, stride=2)[0]
        G += patches @ patches.T / 12  # the mean over the 3 x 4 pixels
    pixels = images.movedim(1, -1).flatten(0, 2)
    A = pixels.T @ pixels / 2
    truth = sum(empirical_fisher(each) for each in per_output)
    assert isinstance(truth, torch.Tensor)
    assert relative_error(truth.diagonal(dim1=1, dim2=2).sum(), fisher.diagonal(dim1=1, dim2=2).sum()) < TOLERANCE
    assert relative_error(dense_kronecker(G[None], A[None]), truth) > 0.3


def last_layer_factors(
    layer: nn.Module, block: Block, images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns Omega, Gamma and the dense Fisher block where every output is a unit-variance target of its own."""
    output = layer(images)
    shape, T = block.shape, block.positions(*block.batched(images, output))
    A, G = torch.zeros(()), torch.zeros(shape.groups, shape.d_out, shape.d_out).double()
    fisher = torch.zeros(())
    for each in torch.eye(output[0].numel()).double().reshape(-1, *output.shape[1:]):
        sums = block.factor_sums(images, each.expand_as(output))
        A, G = sums.A / len(images), G + sums.G / (len(images) * T)
        fisher = fisher + empirical_fisher(per_example_gradients(block, (output * each).flatten(1).sum(1)))
    return A, G, fisher


def test_c4_products_agree_under_other_conventions() -> None:
    """C4: other codes scale A by 1/T^2 and G by T^2, or by 1/T and T (expand); the product A (x) G is the same."""
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 4, 3, padding=1, stride=2, dtype=torch.float64)
    block = make_block("conv", layer)
    assert isinstance(block, Block)
    images = gaussian(3, 2, 7, 6, seed=1)
    factors, _ = captured(layer, block, images, lambda o: o.pow(2).flatten(1).sum(1))
    patches = torch.nn.functional.unfold(images, 3, padding=1, stride=2)
    n, _, T = patches.shape
    rows = torch.cat([patches, torch.ones(n, 1, T)], dim=1).transpose(1, 2).reshape(n * T, -1)
    output = layer(images)
    (mean_gradient,) = torch.autograd.grad(output.pow(2).flatten(1).sum(1).mean(), output)
    out = mean_gradient.flatten(2).transpose(1, 2).reshape(n * T, -1)
    ours = dense_kronecker(factors.A, factors.G)
    # Averaged over positions before the outer product's mean, g multiplied by N and T (CW, RK, DBR).
    A = (rows / T).T @ (rows / T) / n
    G = (out * n * T).T @ (out * n * T) / (n * T)
    assert relative_error(dense_kronecker(A[None], G[None]), ours) < TOLERANCE
    # Expand: A a mean over examples and positions, G a sum over positions.
    A, G = rows.T @ rows / (n * T), (out * n).T @ (out * n) / n
    assert relative_error(dense_kronecker(A[None], G[None]), ours) < TOLERANCE
