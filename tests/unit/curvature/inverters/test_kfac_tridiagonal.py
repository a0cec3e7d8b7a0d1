"""The block-tridiagonal inverse against dense float64 truth (algorithms.md 1.3; checks K4 and K8 of 1.8)."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverter import Inversion, Outcome
from kfdist.curvature.inverters import KfacTridiagonal, make_inverter
from kfdist.curvature.inverters.kfac_tridiagonal import ChainLink
from kfdist.curvature.jobs import decode_result, encode_job, run_job
from kfdist.curvature.ladder import invert_group_with_ladder
from kfdist.curvature.statistics import ChainFactors
from kfdist.types import BlockShape
from tests.support.coupled import Chain, chain_inverse, dense, flat, small_chain
from tests.support.inversions import invert_with_ladder
from tests.support.matrices import gaussian, relative_error

DAMPING = 1e-2
CHAIN = small_chain()
METHOD = make_inverter("kfac-tridiagonal")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-3}


def invert(statistics: dict[str, ChainFactors], damping: float = DAMPING) -> dict[str, Inversion]:
    seeds = {name: place for place, name in enumerate(statistics)}
    return invert_group_with_ladder(METHOD, statistics, damping=damping, previous={}, seeds=seeds)


def links_of(outcomes: dict[str, Inversion]) -> list[ChainLink]:
    links = []
    for outcome in outcomes.values():
        assert isinstance(outcome.preconditioner, ChainLink), outcome.reason
        links.append(outcome.preconditioner)
    return links


def direction(links: Sequence[ChainLink], gradients: Sequence[Tensor]) -> list[Tensor]:
    return ChainLink.apply_group(links, gradients, DAMPING, [BlockMemory() for _ in links])


def matrix_of(links: Sequence[ChainLink], chain: Chain) -> Tensor:
    """The operator as a matrix, a column at a time."""
    sizes = [p * q for _, p, q in chain.shapes]
    columns = []
    for unit in torch.eye(sum(sizes), dtype=torch.float64):
        parts = [part.view(shape) for part, shape in zip(unit.split(sizes), chain.shapes, strict=True)]
        columns.append(flat(direction(links, parts)))
    return torch.stack(columns, dim=1)


def test_the_inverse_reproduces_all_neighbouring_blocks_and_is_tridiagonal() -> None:
    """K4."""
    found = matrix_of(links_of(invert(CHAIN.chain_factors())), CHAIN)
    sizes = [p * q for _, p, q in CHAIN.shapes]
    back = [row.split(sizes, dim=1) for row in torch.linalg.inv(found).split(sizes)]
    expected = CHAIN.damped_fisher(DAMPING)
    for i in range(3):
        for j in range(max(0, i - 1), min(3, i + 2)):
            assert relative_error(back[i][j], expected[i][j]) < 1e-10
    beyond = found.split(sizes)[0].split(sizes, dim=1)[2]
    assert torch.count_nonzero(beyond) == 0
    assert relative_error(back[0][2], expected[0][2]) > 1e-2  # the chain's own guess, not the measured block


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("widths", [(5, 4, 3, 2), (2, 6, 2), (3, 3, 3, 3, 3), (4, 2)])
def test_the_direction_is_the_dense_one(widths: tuple[int, ...], dtype: torch.dtype) -> None:
    chain = small_chain(widths)
    gradients = chain.gradients()
    expected = chain_inverse(chain.damped_fisher(DAMPING)) @ flat(gradients)
    outcomes = invert(chain.chain_factors(dtype))
    assert {outcome.outcome for outcome in outcomes.values()} == {Outcome.DONE}
    found = direction(links_of(outcomes), [gradient.to(dtype) for gradient in gradients])
    assert {each.dtype for each in found} == {dtype}
    assert relative_error(flat(found), expected) < TOLERANCE[dtype]


def test_with_two_layers_it_is_the_whole_matrix() -> None:
    """Two layers are all neighbours: nothing is approximated beyond the Kronecker blocks."""
    chain = small_chain((4, 3, 2))
    gradients = chain.gradients()
    expected = torch.linalg.solve(dense(chain.damped_fisher(DAMPING)), flat(gradients))
    assert relative_error(flat(direction(links_of(invert(chain.chain_factors())), gradients)), expected) < 1e-10


def test_a_chain_of_one_is_kfac() -> None:
    """K8."""
    chain = small_chain((6, 3))
    (statistics,) = chain.chain_factors().values()
    (gradient,) = chain.gradients()
    alone = invert_with_ladder(METHOD, statistics, damping=DAMPING, previous={}, seed=0).preconditioner
    kfac = invert_with_ladder(make_inverter("kfac"), statistics, damping=DAMPING, previous={}, seed=0).preconditioner
    assert alone is not None and kfac is not None
    assert relative_error(alone.apply(gradient, DAMPING), kfac.apply(gradient, DAMPING)) < 1e-10
    assert relative_error(alone.fallback(gradient, DAMPING), kfac.fallback(gradient, DAMPING)) < 1e-10


def test_without_correlation_it_is_kfac_for_each_layer() -> None:
    uncorrelated = {
        name: replace(each, A_next=torch.zeros_like(each.A_next), G_next=torch.zeros_like(each.G_next))
        for name, each in CHAIN.chain_factors().items()
    }
    gradients = CHAIN.gradients()
    found = direction(links_of(invert(uncorrelated)), gradients)
    kfac = make_inverter("kfac")
    for each, gradient, statistics in zip(found, gradients, uncorrelated.values(), strict=True):
        alone = invert_with_ladder(kfac, statistics, damping=DAMPING, previous={}, seed=0).preconditioner
        assert alone is not None and relative_error(each, alone.apply(gradient, DAMPING)) < 1e-10


def test_it_is_symmetric_and_positive() -> None:
    matrix = matrix_of(links_of(invert(CHAIN.chain_factors())), CHAIN)
    assert relative_error(matrix, matrix.mT) < 1e-10
    assert torch.linalg.eigvalsh(matrix).min() > 0


def test_damping_is_lambda_of_the_whole_matrix() -> None:
    gradients = CHAIN.gradients()
    errors = []
    for damping in (1e4, 1e8, 1e12):
        found = direction(links_of(invert(CHAIN.chain_factors(), damping)), gradients)
        errors.append(relative_error(flat(found) * damping, flat(gradients)))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-5  # at the rate 1/sqrt(lambda), as kfac


def test_only_the_whole_chain_in_order_has_a_direction() -> None:
    links, gradients = links_of(invert(CHAIN.chain_factors())), CHAIN.gradients()
    with pytest.raises(
        ValueError, match=r"couples the 3 blocks .* got those at places \[2\]: use apply_group with all"
    ):
        links[2].apply(gradients[2], DAMPING)
    with pytest.raises(ValueError, match=r"got those at places \[1, 0, 2\]"):
        direction([links[1], links[0], links[2]], [gradients[1], gradients[0], gradients[2]])
    with pytest.raises(ValueError, match=r"the gradient at place 1 has shape \(1, 3, 3\), the preconditioner is for"):
        direction(links, [gradients[0], gradients[1][..., 1:], gradients[2]])


def test_a_chain_out_of_order_is_refused() -> None:
    statistics = CHAIN.chain_factors()
    with pytest.raises(ValueError, match=r"'layers.1': its cross factors are for a next layer of sizes \(4, 2\)"):
        invert({name: statistics[name] for name in ("layers.1", "layers.0", "layers.2")})
    with pytest.raises(ValueError, match=r"'layers.0': .* the next in the chain has \(0, 0\)"):
        invert({"layers.0": statistics["layers.0"]})


@pytest.mark.parametrize("damping", [1e-2, 1e-8, 1e-14])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_perfectly_correlated_neighbours(damping: float, dtype: torch.dtype) -> None:
    """The next layer sees the same rows: without damping the first one's conditional covariance would be zero."""
    rows = gaussian(30, 4, seed=5)
    moment = rows.mT @ rows / len(rows)
    chain = Chain([[moment, moment], [moment, moment]], [[moment, moment], [moment, moment]])
    outcomes = invert(chain.chain_factors(dtype), damping)
    gradients = [gradient.to(dtype) for gradient in chain.gradients()]
    found = direction(links_of(outcomes), gradients)
    assert all(bool(each.isfinite().all()) for each in found)
    assert flat(found) @ flat(gradients) > 0
    assert {outcome.outcome for outcome in outcomes.values()} == {Outcome.DONE}
    if damping == 1e-2:
        expected = chain_inverse(chain.damped_fisher(damping)) @ flat(gradients)
        assert relative_error(flat(found), expected) < TOLERANCE[dtype]


def test_zero_factors_leave_the_damping() -> None:
    zeros = {
        name: ChainFactors(**{label: torch.zeros_like(each) for label, each in vars(factors).items()})
        for name, factors in CHAIN.chain_factors().items()
    }
    gradients = CHAIN.gradients()
    assert relative_error(flat(direction(links_of(invert(zeros)), gradients)), flat(gradients) / DAMPING) < 1e-10


def test_correlations_above_one_are_clamped_and_told() -> None:
    """Cross factors that don't belong to the factors beside them."""
    spoiled = {
        name: replace(each, A_next=50 * each.A_next, G_next=50 * each.G_next)
        for name, each in CHAIN.chain_factors().items()
    }
    outcomes = invert(spoiled)
    assert [outcome.outcome for outcome in outcomes.values()] == [Outcome.CLAMPED, Outcome.CLAMPED, Outcome.DONE]
    assert outcomes["layers.0"].diagnostics["largest_correlation_A"] > 1
    assert all(bool(each.isfinite().all()) for each in direction(links_of(outcomes), CHAIN.gradients()))


def test_an_indefinite_factor_fails_or_is_damped_for_the_whole_chain() -> None:
    statistics = CHAIN.chain_factors()
    A = statistics["layers.1"].A.clone()
    A[0, 0, 1] = A[0, 1, 0] = 3 * A.diagonal(dim1=-2, dim2=-1).max()
    statistics["layers.1"] = replace(statistics["layers.1"], A=A)
    attempts = METHOD.invert_group(statistics, damping=1e-6, previous={}, seeds=dict.fromkeys(statistics, 0))
    assert "factor A plus" in attempts["layers.1"].reason
    assert attempts["layers.0"].reason.startswith("'layers.1' of the same chain failed: factor A plus")
    damped = invert(statistics, DAMPING)
    assert {outcome.outcome for outcome in damped.values()} == {Outcome.MORE_DAMPING}


def test_diagnostics_of_each_block() -> None:
    outcome = invert(CHAIN.chain_factors())["layers.0"]
    assert outcome.diagnostics["residual_A"] < 1e-10 and outcome.diagnostics["residual_G"] < 1e-10
    assert 0 < outcome.diagnostics["largest_correlation_A"] < 1
    assert (outcome.diagnostics["rank_A"], outcome.diagnostics["rank_G"]) == (6, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_chain_travels_whole(dtype: torch.dtype) -> None:
    statistics = CHAIN.chain_factors(dtype)
    seeds = {name: place for place, name in enumerate(statistics)}
    payload = encode_job(inverter=METHOD, statistics=statistics, damping=DAMPING, seeds=seeds, previous={}, threads=1)
    arrived = decode_result(run_job(payload)).outcomes
    gradients = [gradient.to(dtype) for gradient in CHAIN.gradients()]
    here, there = links_of(invert(statistics)), links_of({name: arrived[name] for name in statistics})
    pairs = zip(direction(here, gradients), direction(there, gradients), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_needs_and_refusals() -> None:
    method = KfacTridiagonal()
    first, second = BlockShape(d_out=4, d_in=6), BlockShape(d_out=3, d_in=5)
    assert method.needs(first).sums == {"A", "G", "A_next", "G_next"}
    assert method.refusal({"a": first, "b": second}) == ""
    assert method.refusal({"a": first}) == ""
    assert "needs at least one layer" in method.refusal({})
    assert "'b' has 3 outputs and 'a' after it takes 6 inputs" in method.refusal({"b": second, "a": first})
    assert "'c' is a convolution" in method.refusal({"c": BlockShape(d_out=4, d_in=6, convolution=True)})
    assert "'c' is a convolution" in method.refusal({"c": BlockShape(d_out=4, d_in=6, groups=2)})
