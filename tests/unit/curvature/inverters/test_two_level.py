"""The two-level method against dense float64 truth (algorithms.md 7.1), and what its default does otherwise."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverse import KroneckerSpectrum
from kfdist.curvature.inverter import Inversion, Outcome
from kfdist.curvature.inverters import TwoLevel, make_inverter
from kfdist.curvature.inverters.two_level import TwoLevelBlock, inner_sums
from kfdist.curvature.jobs import decode_result, encode_job, run_job
from kfdist.curvature.ladder import invert_group_with_ladder
from kfdist.curvature.references import damping_shares, dense_kronecker
from kfdist.curvature.statistics import CoarseFactors
from kfdist.errors import ConfigError
from kfdist.types import BlockShape
from kfdist.wire.records import tensor_fields
from tests.support.coupled import Chain, dense, flat, restriction, small_chain
from tests.support.inversions import invert_with_ladder
from tests.support.matrices import gaussian, relative_error

DAMPING = 1e-2
CHAIN = small_chain()
SIZES = [p * q for _, p, q in CHAIN.shapes]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-3}


def invert(statistics: Mapping[str, CoarseFactors], **settings: Any) -> dict[str, Inversion]:
    seeds = {name: place for place, name in enumerate(statistics)}
    method = make_inverter("two-level", **settings)
    return invert_group_with_ladder(method, statistics, damping=DAMPING, previous={}, seeds=seeds)


def blocks_of(outcomes: Mapping[str, Inversion]) -> list[TwoLevelBlock]:
    blocks = []
    for outcome in outcomes.values():
        assert isinstance(outcome.preconditioner, TwoLevelBlock), outcome.reason
        blocks.append(outcome.preconditioner)
    return blocks


def made(chain: Chain = CHAIN, dtype: torch.dtype = torch.float64, **settings: Any) -> list[TwoLevelBlock]:
    return blocks_of(invert(chain.coarse_factors(dtype), **settings))


def direction(blocks: Sequence[TwoLevelBlock], gradients: Sequence[Tensor], damping: float = DAMPING) -> list[Tensor]:
    return TwoLevelBlock.apply_group(blocks, gradients, damping, [BlockMemory() for _ in blocks])


def matrix_of(blocks: Sequence[TwoLevelBlock], damping: float = DAMPING) -> Tensor:
    columns = []
    for unit in torch.eye(sum(SIZES), dtype=torch.float64):
        parts = [part.view(shape) for part, shape in zip(unit.split(SIZES), CHAIN.shapes, strict=True)]
        columns.append(flat(direction(blocks, parts, damping)))
    return torch.stack(columns, dim=1)


def inner_matrix(rule: str, damping: float = DAMPING) -> Tensor:
    """B: the damped block-diagonal matrix, dense."""
    parts = []
    for i in range(3):
        A, G = CHAIN.A[i][i][None], CHAIN.G[i][i][None]
        if rule == "common":
            parts.append(dense_kronecker(A, G)[0] + damping * torch.eye(SIZES[i], dtype=torch.float64))
        else:
            shares = damping_shares(A, G, rule=rule, damping=damping)
            damped_A = A + shares[0] * torch.eye(A.shape[-1], dtype=torch.float64)
            parts.append(dense_kronecker(damped_A, G + shares[1] * torch.eye(G.shape[-1], dtype=torch.float64))[0])
    return torch.block_diag(*parts)


def coarse_matrix() -> Tensor:
    R = restriction(SIZES)
    return R @ dense(CHAIN.fisher()) @ R.mT


def expected_operator(rule: str, combination: str, omega_fine: float, omega_coarse: float) -> Tensor:
    R, B, F_c = restriction(SIZES), inner_matrix(rule), coarse_matrix()
    if combination == "additive":
        C = torch.linalg.inv(F_c + DAMPING * torch.eye(3, dtype=torch.float64))
    else:
        D = R @ B @ R.mT
        C = torch.linalg.inv(D + F_c - F_c.diagonal().diag()) - torch.linalg.inv(D)
    return omega_fine * torch.linalg.inv(B) + omega_coarse * R.mT @ C @ R


def test_the_coarse_matrix_is_the_restricted_one() -> None:
    """R F R^T, from the sums of the cross factors alone."""
    for combination in ("difference", "additive"):
        rows = torch.stack([block.coarse_row for block in made(combination=combination)])
        assert relative_error(rows, coarse_matrix()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rule", ["common", "pi"])
@pytest.mark.parametrize("combination", ["difference", "additive"])
@pytest.mark.parametrize(("omega_fine", "omega_coarse"), [(1.0, 1.0), (1.0, 0.5), (0.7, 0.0)])
def test_the_direction_is_the_dense_one(
    combination: str, rule: str, omega_fine: float, omega_coarse: float, dtype: torch.dtype
) -> None:
    blocks = made(
        dtype=dtype,
        combination=combination,
        inner_settings={"damping_rule": rule},
        omega_fine=omega_fine,
        omega_coarse=omega_coarse,
    )
    gradients = CHAIN.gradients()
    found = direction(blocks, [gradient.to(dtype) for gradient in gradients])
    assert {each.dtype for each in found} == {dtype}
    expected = expected_operator(rule, combination, omega_fine, omega_coarse) @ flat(gradients)
    assert relative_error(flat(found), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("combination", ["difference", "additive"])
@pytest.mark.parametrize("inner", ["kfac-eigen", "rs-kfac"])
def test_without_its_coarse_part_it_is_the_inner_method(inner: str, combination: str) -> None:
    blocks, gradients = made(inner=inner, combination=combination, omega_coarse=0.0), CHAIN.gradients()
    method = make_inverter(inner)
    pairs = zip(direction(blocks, gradients), gradients, CHAIN.coarse_factors().values(), strict=True)
    for place, (found, gradient, statistics) in enumerate(pairs):
        alone = invert_with_ladder(method, statistics, damping=DAMPING, previous={}, seed=place).preconditioner
        assert alone is not None and torch.equal(found, alone.apply(gradient, DAMPING))
        assert torch.equal(blocks[place].fallback(gradient, DAMPING), alone.fallback(gradient, DAMPING))


def test_one_block_alone_is_the_inner_method_or_the_published_sum() -> None:
    chain = small_chain((5, 3))
    (statistics,) = chain.coarse_factors().values()
    (gradient,) = chain.gradients()
    F = dense_kronecker(statistics.A, statistics.G)[0]
    identity = torch.eye(len(F), dtype=torch.float64)
    fine = torch.linalg.solve(F + DAMPING * identity, gradient.flatten())
    R = restriction([len(F)])
    coarse = R.mT @ ((R @ gradient.flatten()) / (R @ F @ R.mT + DAMPING).squeeze())
    for combination, expected in (("difference", fine), ("additive", fine + coarse)):
        method = make_inverter("two-level", combination=combination)
        block = invert_with_ladder(method, statistics, damping=DAMPING, previous={}, seed=0).preconditioner
        assert block is not None
        assert relative_error(block.apply(gradient, DAMPING).flatten(), expected) < 1e-10


def test_without_correlation_between_blocks_it_is_the_inner_method() -> None:
    alone = {
        name: replace(each, a_cross=torch.zeros_like(each.a_cross).index_fill(0, torch.tensor(place), 1.0))
        for place, (name, each) in enumerate(CHAIN.coarse_factors().items())
    }
    gradients = CHAIN.gradients()
    found = direction(blocks_of(invert(alone)), gradients)
    expected = direction(made(omega_coarse=0.0), gradients)
    assert relative_error(flat(found), flat(expected)) < 1e-12


@pytest.mark.parametrize("rule", ["common", "pi"])
def test_damping_is_lambda_of_the_whole_matrix_by_default(rule: str) -> None:
    """lambda times the direction tends to the gradient as fast as the inner method's."""
    gradients = CHAIN.gradients()
    errors: dict[float, list[float]] = {}
    for omega_coarse in (1.0, 0.0):
        blocks = made(inner_settings={"damping_rule": rule}, omega_coarse=omega_coarse)
        errors[omega_coarse] = [
            relative_error(flat(direction(blocks, gradients, damping)) * damping, flat(gradients))
            for damping in (1e4, 1e8, 1e12)
        ]
    assert errors[1.0][0] > errors[1.0][1] > errors[1.0][2] and errors[1.0][2] < 1e-5
    assert errors[1.0] == pytest.approx(errors[0.0], rel=0.2)


def test_the_published_sum_tends_to_something_else() -> None:
    """To (I + R^T R) V, which is why it isn't the default."""
    gradients, R = CHAIN.gradients(), restriction(SIZES)
    found = flat(direction(made(combination="additive"), gradients, 1e12)) * 1e12
    assert relative_error(found, flat(gradients) + R.mT @ (R @ flat(gradients))) < 1e-9
    assert relative_error(found, flat(gradients)) > 0.5


@pytest.mark.parametrize("combination", ["difference", "additive"])
@pytest.mark.parametrize("damping", [1e-8, 1e-2, 1e2])
@pytest.mark.parametrize(
    ("inner", "inner_settings"),
    [
        ("kfac-eigen", {"damping_rule": "common"}),
        ("kfac-eigen", {"damping_rule": "pi"}),
        ("rs-kfac", {"rank": 1, "oversampling": 1, "damping_rule": "common"}),
        ("rs-kfac", {"rank": 1, "oversampling": 1, "damping_rule": "pi", "spectrum_continuation": True}),
    ],
)
def test_it_is_symmetric_and_positive(
    inner: str, inner_settings: dict[str, Any], damping: float, combination: str
) -> None:
    """Also where the inner method keeps less of a block than the coarse matrix saw."""
    matrix = matrix_of(made(inner=inner, inner_settings=inner_settings, combination=combination), damping)
    assert relative_error(matrix, matrix.mT) < 1e-8
    assert torch.linalg.eigvalsh((matrix + matrix.mT) / 2).min() > 0


def test_sums_of_a_truncated_factor_are_those_of_what_is_kept() -> None:
    settings = {"rank": 2, "oversampling": 1, "spectrum_continuation": True}
    block = made(inner="rs-kfac", inner_settings=settings)[0].inner
    for U, w, tail, found in (
        (block.U_A[0], block.w_A[0], block.tail_A[0], inner_sums(block)[0]),
        (block.U_G[0], block.w_G[0], block.tail_G[0], inner_sums(block)[1]),
    ):
        outside = torch.eye(len(U), dtype=torch.float64) - U @ U.mT
        assert relative_error(found[0], (U @ w.diag() @ U.mT + tail * outside).sum()) < 1e-10


def test_cross_sums_that_are_no_second_moment_are_projected() -> None:
    """As where maps of different sizes are compared: correlations of -1 among three blocks contradict each other."""
    statistics = CHAIN.coarse_factors()
    sign = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    spoiled = {
        name: replace(each, a_cross=sign[place], g_cross=torch.ones(3, dtype=torch.float64))
        for place, (name, each) in enumerate(statistics.items())
    }
    for combination in ("difference", "additive"):
        outcomes = invert(spoiled, combination=combination)
        assert outcomes["layers.0"].diagnostics["smallest_eigenvalue_coarse"] == pytest.approx(-1)
        assert {outcome.outcome for outcome in outcomes.values()} == {Outcome.DONE}
        assert torch.linalg.eigvalsh(matrix_of(blocks_of(outcomes))).min() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blocks_with_perfectly_correlated_sums(dtype: torch.dtype) -> None:
    """One example: every block's sum tells all others."""
    chain = small_chain(examples=1)
    for combination in ("difference", "additive"):
        blocks = blocks_of(invert(chain.coarse_factors(dtype), combination=combination))
        for damping in (1e-2, 1e-12):
            gradients = [gradient.to(dtype) for gradient in chain.gradients()]
            found = direction(blocks, gradients, damping)
            assert all(bool(each.isfinite().all()) for each in found)
            assert flat(found) @ flat(gradients) > 0


def test_zero_factors_leave_the_damping() -> None:
    zeros = {
        name: CoarseFactors(**{label: torch.zeros_like(each) for label, each in vars(factors).items()})
        for name, factors in CHAIN.coarse_factors().items()
    }
    gradients = CHAIN.gradients()
    assert relative_error(flat(direction(blocks_of(invert(zeros)), gradients)), flat(gradients) / DAMPING) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_group_travels_whole_with_its_inner_records(dtype: torch.dtype) -> None:
    statistics = CHAIN.coarse_factors(dtype)
    method = make_inverter("two-level", inner="rs-kfac", inner_settings={"rank": 2, "damping_rule": "common"})
    seeds = {name: place for place, name in enumerate(statistics)}
    payload = encode_job(inverter=method, statistics=statistics, damping=DAMPING, seeds=seeds, previous={}, threads=1)
    arrived = decode_result(run_job(payload)).outcomes
    outcomes = invert_group_with_ladder(method, statistics, damping=DAMPING, previous={}, seeds=seeds)
    here, there = blocks_of(outcomes), blocks_of({name: arrived[name] for name in statistics})
    assert all(type(block.inner) is KroneckerSpectrum for block in there)
    for one, other in zip(here, there, strict=True):
        expected, found = tensor_fields(one), tensor_fields(other)
        assert "inner.U_A" in expected and found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    gradients = [gaussian(*shape, seed=9).to(dtype) for shape in CHAIN.shapes]
    pairs = zip(direction(here, gradients), direction(there, gradients), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_needs_notes_and_refusals() -> None:
    method = TwoLevel(inner="rs-kfac")
    shape = BlockShape(d_out=4, d_in=6)
    assert method.needs(shape).sums == {"A", "G", "a_cross", "g_cross"}
    assert "around rs-kfac" in method.note(shape)
    assert method.refusal({"a": shape, "b": replace(shape, convolution=True)}) == ""
    assert "no cross factors for the grouped convolution 'b'" in method.refusal({"b": replace(shape, groups=2)})
    assert method.cost(shape) == make_inverter("rs-kfac").cost(shape)
    with pytest.raises(ValueError, match=r"cross sums have shapes \(3,\) and \(3,\), must be \(1,\)"):
        invert({"layers.0": CHAIN.coarse_factors()["layers.0"]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner": "kfac"}, "inner: 'kfac' is not allowed; must be a method that keeps eigenpairs"),
        ({"inner": "two-level"}, "inner: 'two-level' is not allowed"),
        ({"inner": "eva"}, "inner: 'eva' is not allowed"),
        ({"inner": "cholesky"}, "inner: unknown method 'cholesky'"),
        ({"inner_settings": {"rang": 3}}, "inner_settings: kfac-eigen has no setting 'rang'"),
        ({"inner_settings": {"damping_rule": "relative"}}, "inner_settings.damping_rule: 'relative' is not allowed"),
        ({"inner": "rs-kfac", "inner_settings": {"rank": 0}}, "inner_settings.rank: 0 is not allowed"),
        ({"inner_settings": [1]}, "inner_settings: .1. must be a table"),
        ({"combination": "sum"}, "combination: 'sum' is not allowed; choose one of 'difference', 'additive'"),
        ({"omega_fine": 0}, "omega_fine: 0 is not allowed"),
        ({"omega_fine": float("inf")}, "omega_fine: inf is not allowed"),
        ({"omega_coarse": -1.0}, "omega_coarse: -1.0 is not allowed; must be a finite number of at least 0"),
        ({"omega_coarse": 2.0}, 'omega_coarse: 2.0 is more than omega_fine = 1.0: .* combination = "additive"'),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_inverter("two-level", **settings)
