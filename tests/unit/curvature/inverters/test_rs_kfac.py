"""RS-KFAC and SRE-KFAC as a whole: R1 to R6 of algorithms.md 3.9, their settings, and what they keep between versions.

The decompositions alone: tests/unit/linalg/test_lowrank.py.
"""

import itertools
import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from kfdist.curvature.averages import BatchStatistics, WeightedSums, means
from kfdist.curvature.inverse import KroneckerSpectrum
from kfdist.curvature.inverter import AbstractInverter, Inversion, Outcome
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.references import damping_shares, leading_part, solve_factored_dense
from kfdist.curvature.spectra import AdaptiveRank
from kfdist.curvature.statistics import KroneckerFactors
from tests.support.inversions import invert_with_ladder
from tests.support.matrices import gaussian, relative_error, with_spectrum

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""R1 asks 1e-10 and 1e-5; the float32 direction is compared here at a condition number of about 100."""

P, Q = 40, 60
DAMPING = 1e-1
V = gaussian(1, P, Q, seed=1)
SMALL = p, q = 20, 30
"""For what is compared with a dense solver, whose time grows with (p q)^3."""
v = gaussian(1, p, q, seed=1)

both_methods = pytest.mark.parametrize("name", ["rs-kfac", "sre-kfac"])


def factors(
    dtype: torch.dtype = torch.float64,
    *,
    rank: int | None = None,
    decay: float = 0.8,
    size: tuple[int, int] = (P, Q),
) -> KroneckerFactors:
    def spectrum(d: int) -> Tensor:
        values = decay ** torch.arange(d, dtype=torch.float64)
        return torch.where(torch.arange(d) < (rank or d), values, 0.0)

    G, A = (with_spectrum(spectrum(d)[None], seed=seed) for d, seed in zip(size, (3, 2), strict=True))
    return KroneckerFactors(A=A.to(dtype), G=G.to(dtype))


def invert_with(
    inverter: AbstractInverter, given: KroneckerFactors, *, seed: int = 0, previous: Mapping[str, Tensor] | None = None
) -> tuple[Inversion, KroneckerSpectrum]:
    outcome = invert_with_ladder(inverter, given, damping=DAMPING, previous=previous or {}, seed=seed)
    assert isinstance(outcome.preconditioner, KroneckerSpectrum), outcome.reason
    return outcome, outcome.preconditioner


def invert(
    given: KroneckerFactors, *, name: str = "rs-kfac", seed: int = 0, **settings: Any
) -> tuple[Inversion, KroneckerSpectrum]:
    return invert_with(make_inverter(name, **{"direction_error": 0, **settings}), given, seed=seed)


def rebuilt(values: Tensor, vectors: Tensor) -> Tensor:
    return vectors @ torch.diag_embed(values) @ vectors.mT


@both_methods
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rule", ["pi", "relative"])
def test_r1_full_rank_equals_the_dense_factored_solve(name: str, dtype: torch.dtype, rule: str) -> None:
    """R1: r = d gives (G + lambda_G I)^{-1} V (A + lambda_A I)^{-1}."""
    given = factors(dtype, size=SMALL)
    _, made = invert(given, name=name, rank=q, damping_rule=rule)
    shares = damping_shares(given.A, given.G, rule=rule, damping=DAMPING)
    expected = solve_factored_dense(given.A, given.G, shares, v)
    assert relative_error(made.apply(v.to(dtype), DAMPING), expected) < TOLERANCE[dtype]


@both_methods
def test_r2_factors_of_the_rank_are_exact(name: str) -> None:
    """R2: rank(M) = r with five more columns loses nothing."""
    given = factors(rank=12, size=SMALL)
    outcome, made = invert(given, name=name, rank=12, oversampling=5)
    assert made.U_A.shape == (1, q, 12) and made.U_G.shape == (1, p, 12)
    shares = damping_shares(given.A, given.G, rule="pi", damping=DAMPING)
    expected = solve_factored_dense(given.A, given.G, shares, v)
    assert relative_error(made.apply(v, DAMPING), expected) < TOLERANCE[torch.float64]
    assert outcome.diagnostics["approximation_error_A"] < TOLERANCE[torch.float64]


@both_methods
@pytest.mark.parametrize("continued", [False, True])
def test_r3_continuation_inverts_the_completed_matrix(name: str, continued: bool) -> None:
    """R3: the missing eigenvalues count as the smallest kept one, or as zero; pi still comes from the full traces."""
    given = factors(size=SMALL)
    # The oversampled sketch is the whole space, so that truncation is exact and only the formula is tested.
    _, made = invert(given, name=name, rank=10, oversampling=q, spectrum_continuation=continued)
    assert made.U_A.shape == (1, q, 10)
    shares = damping_shares(given.A, given.G, rule="pi", damping=DAMPING)
    A, G = leading_part(given.A, 10, continued=continued), leading_part(given.G, 10, continued=continued)
    expected = solve_factored_dense(A, G, shares, v)
    assert relative_error(made.apply(v, DAMPING), expected) < TOLERANCE[torch.float64]


def test_continuation_is_nearer_to_the_truth_on_a_slow_spectrum() -> None:
    values = torch.linspace(2, 1, q, dtype=torch.float64)
    given = KroneckerFactors(A=with_spectrum(values[None], seed=2), G=with_spectrum(values[None, :p], seed=3))
    shares = damping_shares(given.A, given.G, rule="pi", damping=DAMPING)
    truth = solve_factored_dense(given.A, given.G, shares, v)
    errors = [
        relative_error(invert(given, rank=10, spectrum_continuation=on)[1].apply(v, DAMPING), truth)
        for on in (True, False)
    ]
    assert errors[0] < 0.2 * errors[1]


def test_r4_old_batches_leave_little_behind() -> None:
    """R4: after j further batches of rank n, eigenvalue j n + 1 of the average is at most rho^j max ||M_i||."""
    d, n, rho = 40, 2, 0.5
    sums = WeightedSums({"A": (1, d, d)}, dtype=torch.float64, device="cpu")
    norms = []
    for step in range(12):
        rows = gaussian(1, n, d, seed=step)
        sums.fold(BatchStatistics({"A": rows.mT @ rows}, n, n), rho)
        norms.append(float(torch.linalg.matrix_norm(rows.mT @ rows / n, 2)))
    eigenvalues = torch.linalg.eigvalsh(means({**sums.sums, **sums.counts})["A"][0]).flip(0)
    for j in range(1, 12):
        assert float(eigenvalues[j * n]) <= rho**j * max(norms)


@both_methods
def test_r5_the_error_is_about_the_first_neglected_eigenvalue(name: str) -> None:
    """R5: ||M - U w U^T||_2 <= (1 + small) w_{r+1} for q = 4 on w_i = 0.9^i; no approximation of rank r does better."""
    given = factors(decay=0.9)
    for seed in range(3):
        _, made = invert(given, name=name, rank=10, oversampling=10, power_iterations=4, seed=seed)
        for matrix, values, vectors in ((given.A, made.w_A, made.U_A), (given.G, made.w_G, made.U_G)):
            error = float(torch.linalg.matrix_norm(matrix - rebuilt(values, vectors), 2))
            assert 0.9**10 * (1 - 1e-6) <= error <= 1.02 * 0.9**10


@both_methods
@pytest.mark.parametrize("rank", [1, 12, Q], ids=lambda rank: f"rank={rank}")
def test_r6_vectors_are_orthonormal_in_float32(name: str, rank: int) -> None:
    """R6: ||U^T U - I|| <= 1e-5, also where the factors have fewer directions than the sketch."""
    for given in (factors(torch.float32), factors(torch.float32, rank=3)):
        _, made = invert(given, name=name, rank=rank)
        for vectors in (made.U_A, made.U_G):
            assert (vectors.mT @ vectors - torch.eye(vectors.shape[-1])).abs().max() < 1e-5


def test_rank_is_clamped_to_each_factor() -> None:
    given = KroneckerFactors(A=factors().A, G=factors().G[:, :4, :4].contiguous())
    outcome, made = invert(given, rank=10)
    assert made.U_A.shape == (1, Q, 10) and made.U_G.shape == (1, 4, 4)
    assert (outcome.diagnostics["rank_A"], outcome.diagnostics["rank_G"]) == (10, 4)
    assert made.apply(V[:, :4], DAMPING).shape == (1, 4, Q)


@both_methods
@pytest.mark.parametrize("rule", ["pi", "relative", "common"])
def test_zero_factors_are_floored(name: str, rule: str) -> None:
    """A dead layer: relative damping of nothing would divide by zero (algorithms.md 3.8)."""
    zero = KroneckerFactors(A=torch.zeros(1, Q, Q), G=torch.zeros(1, P, P))
    settings = {"rank": 10, "adaptive_rank": True, "warm_start": True, "damping_rule": rule}
    outcome, made = invert(zero, name=name, **settings)
    scale = DAMPING**2 if rule == "relative" else DAMPING
    assert relative_error(made.apply(V.float(), DAMPING) * scale, V) < 1e-6
    _, again = invert_with(make_inverter(name, **settings), zero, previous=outcome.state)
    assert torch.equal(again.apply(V.float(), DAMPING), made.apply(V.float(), DAMPING))


@both_methods
@pytest.mark.parametrize("rule", ["pi", "relative", "common"])
def test_pairs_that_damping_outweighs_are_cut_off_and_the_direction_hardly_changes(name: str, rule: str) -> None:
    given = factors()
    settings = {"name": name, "rank": 50, "oversampling": Q, "damping_rule": rule, "warm_start": True}
    all_pairs = invert(given, **settings)[1]
    outcome, made = invert(given, **settings, direction_error=0.05)
    ranks = made.U_A.shape[-1], made.U_G.shape[-1]
    assert ranks == (32, 32) and (outcome.diagnostics["rank_A"], outcome.diagnostics["rank_G"]) == ranks
    assert made.least_damping == DAMPING / 2
    error = relative_error(made.apply(V, DAMPING), all_pairs.apply(V, DAMPING))
    assert 0 < error <= outcome.diagnostics["direction_error"] <= 0.05
    assert outcome.state["U_A"].shape == (1, Q, 50)  # the next sketch begins with what was found


def test_seeds_change_the_sketch_and_each_factor_has_its_own() -> None:
    given = factors()
    first, again, other = (invert(given, rank=5, oversampling=2, power_iterations=0, seed=s)[1] for s in (1, 1, 2))
    assert torch.equal(first.U_A, again.U_A)
    assert not torch.equal(first.U_A, other.U_A)
    same = KroneckerFactors(A=given.A, G=given.A)
    shared = invert(same, rank=5, oversampling=2, power_iterations=0)[1]
    assert not torch.equal(shared.U_A, shared.U_G)


@both_methods
def test_a_large_negative_eigenvalue_is_clamped_and_reported(name: str) -> None:
    values = torch.zeros(Q, dtype=torch.float64)
    values[:3] = torch.tensor([3.0, -1.0, 2.0])
    matrix = with_spectrum(values[None], seed=2)
    shifted = matrix + 0.2 * torch.eye(Q)  # keeps the diagonal positive, so that only the spectrum gives it away
    outcome, made = invert(KroneckerFactors(A=shifted, G=factors().G), name=name, rank=2, oversampling=20)
    assert outcome.outcome is Outcome.CLAMPED
    assert bool((made.w_A >= 0).all())
    assert outcome.diagnostics["smallest_eigenvalue_A"] == pytest.approx(-0.8, rel=0.05)  # a sketch, not exact


def test_without_what_changes_over_versions_nothing_is_kept() -> None:
    assert invert(factors(), rank=5)[0].state == {}


@both_methods
def test_a_rank_schedule_counts_inversions_and_keeps_its_oversampling(name: str) -> None:
    """The sketch's width is r + l after every change: a published code left it as it was (algorithms.md 3.8)."""
    inverter = make_inverter(name, rank=4, oversampling=5, rank_schedule=[[2, 12], [3, 6]])
    assert make_inverter(name, **json.loads(json.dumps(inverter.settings()))) == inverter
    given, state, found = factors(rank=12), {}, []
    for _ in range(5):
        outcome, made = invert_with(inverter, given, previous=state)
        found.append(made.U_A.shape[-1])
        if found[-1] == 12:  # exact only with columns to spare (R2)
            assert outcome.diagnostics["approximation_error_A"] < TOLERANCE[torch.float64]
        state = outcome.state
    assert found == [4, 4, 12, 6, 6]
    assert int(state["inversions"]) == 5


@both_methods
def test_an_adaptive_rank_follows_each_factors_spectrum(name: str) -> None:
    """It stops where w_min/w_max of the kept eigenvalues is between the two thresholds, each factor for itself."""
    slow, fast = 0.95 ** torch.arange(80, dtype=torch.float64), 0.6 ** torch.arange(80, dtype=torch.float64)
    given = KroneckerFactors(A=with_spectrum(slow[None], seed=2), G=with_spectrum(fast[None], seed=3))
    inverter, state, ranks = make_inverter(name, rank=30, adaptive_rank=True, direction_error=None), {}, []
    for _ in range(6):
        outcome, made = invert_with(inverter, given, previous=state)
        ranks.append((made.U_A.shape[-1], made.U_G.shape[-1]))
        state = outcome.state
    # 0.95^(r-1) <= 0.053 from r = 59 on; 0.6^(r-1) < 0.026 down to the smallest rank.
    assert ranks == [(30, 30), (40, 20), (50, 10), (60, 10), (60, 10), (60, 10)]
    assert outcome.diagnostics["rank_A"] == 60


@pytest.mark.parametrize(
    ("values", "d", "expected"),
    [
        ([1.0, 0.06], 90, 12),
        ([1.0, 0.053], 90, 10),
        ([1.0, 0.01], 90, 10),
        ([1.0] * 30, 35, 35),
        ([1.0] * 699, 900, 700),
        ([0.0] * 30, 35, 20),
        ([1.0, 0.5, 0.0, 0.0], 4, 4),
    ],
)
def test_the_adaptive_rule_stays_in_its_bounds(values: list[float], d: int, expected: int) -> None:
    rule = AdaptiveRank(grow_above=0.053, shrink_below=0.026, grow=10, shrink=10, least=10, most=700)
    assert rule.following(torch.tensor([values]), d, rank=len(values)) == expected


def test_the_group_that_falls_off_least_decides_the_rank() -> None:
    rule = AdaptiveRank(grow_above=0.5, shrink_below=0.1, grow=1, shrink=1, least=1, most=9)
    assert rule.following(torch.tensor([[1.0, 0.01], [2.0, 1.5]]), 9, rank=2) == 3


@both_methods
def test_an_adaptive_rank_goes_on_from_what_was_asked_for_where_a_batch_has_fewer_pairs(name: str) -> None:
    rows = torch.randn(1, 32, 800, generator=torch.Generator().manual_seed(0))
    outcome, _ = invert_with(
        make_inverter(name, adaptive_rank=True, rank=220), KroneckerFactors(A=rows.mT @ rows / 32, G=torch.eye(3)[None])
    )
    assert (int(outcome.state["rank_A"]), int(outcome.state["rank_G"])) == (210, 3)


@both_methods
def test_a_warm_start_without_power_iterations_is_better_than_a_cold_one(name: str) -> None:
    """Where the factor has moved since, too: every version takes the error nearer to the least that rank 8 can have."""
    settings = {"rank": 8, "oversampling": 4, "power_iterations": 0}
    warm = make_inverter(name, warm_start=True, **settings)
    old, news = factors(decay=0.9), gaussian(1, Q, 2, seed=9)
    new = KroneckerFactors(A=0.9 * old.A + 0.01 * news @ news.mT, G=old.G)
    least = float((new.A - leading_part(new.A, 8, continued=False)).norm())

    def excess(made: KroneckerSpectrum) -> float:
        return float((new.A - rebuilt(made.w_A, made.U_A)).norm()) - least

    state, errors = invert_with(warm, old)[0].state, [excess(invert(new, name=name, seed=1, **settings)[1])]
    for seed in (1, 2, 3):
        outcome, made = invert_with(warm, new, seed=seed, previous=state)
        errors.append(excess(made))
        state = outcome.state
    assert all(later < 0.5 * earlier for earlier, later in itertools.pairwise(errors)), errors
    assert errors[-1] >= -1e-12


@pytest.mark.parametrize("columns", [3, 16])
def test_a_warm_start_takes_any_rank_and_precision(columns: int) -> None:
    inverter = make_inverter("rs-kfac", rank=8, warm_start=True)
    state = invert(factors(torch.float32), rank=columns, warm_start=True)[0].state
    assert {label: (u.dtype, u.shape[-1]) for label, u in state.items()}["U_A"] == (torch.float32, columns)
    _, made = invert_with(inverter, factors(), previous=state)
    assert made.U_A.shape == (1, Q, 8) and made.U_A.dtype == torch.float64
