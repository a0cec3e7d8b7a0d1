"""B-KFAC, B-R-KFAC and B-KFAC-C over sequences of foldings, against dense moving averages in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kfdist.curvature.inverse import KroneckerSpectrum
from kfdist.curvature.inverter import Inversion, Outcome
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.references import leading_part
from kfdist.curvature.statistics import Increment, KroneckerFactors
from kfdist.linalg.brand import orthogonality_error
from kfdist.wire.records import tensor_fields
from tests.support.increments import folding_sequence, run_chain
from tests.support.inversions import invert_with_ladder
from tests.support.matrices import gaussian, relative_error

Q, P, ROOM = 60, 50, 6
RAGGED = [6, 3, 6, 1, 5, 6]
"""Examples of each folding; the last batch of an epoch is shorter."""

ALL_KEPT: dict[str, Any] = {"rank": 40, "increment_rows": ROOM, "damping_rule": "pi"}
"""Nothing is cut off: the foldings have 27 rows altogether."""

CUT: dict[str, Any] = {"rank": 8, "increment_rows": ROOM, "oversampling": 4}

V = gaussian(1, P, Q, seed=99)
METHODS = ["b-kfac", "b-r-kfac", "b-kfac-c"]


def spectrum_of(attempt: Inversion) -> KroneckerSpectrum:
    assert isinstance(attempt.preconditioner, KroneckerSpectrum), attempt.reason
    return attempt.preconditioner


def represented(attempt: Inversion) -> tuple[Tensor, Tensor]:
    found = spectrum_of(attempt)
    A = found.U_A @ torch.diag_embed(found.w_A) @ found.U_A.mT
    return A, found.U_G @ torch.diag_embed(found.w_G) @ found.U_G.mT


def rs_kfac(factors: KroneckerFactors, **settings: Any) -> Tensor:
    inverter = make_inverter("rs-kfac", **settings)
    return spectrum_of(inverter.invert(factors, damping=1e-2, previous={}, seed=5)).apply(V, 1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_untruncated_it_equals_rs_kfac_of_full_rank_on_the_same_average(method: str) -> None:
    """algorithms.md 10.2, at every version; in between, the others are overwritten or corrected."""
    increments, averages = folding_sequence(RAGGED, q=Q, p=P, room=ROOM, dense_at=lambda k: k % 3 == 0)
    for attempt, average in zip(run_chain(method, increments, **ALL_KEPT), averages, strict=True):
        expected = rs_kfac(average, rank=1000, damping_rule="pi")
        assert relative_error(spectrum_of(attempt).apply(V, 1e-2), expected) <= 1e-10
        A, G = represented(attempt)
        assert relative_error(A, average.A) <= 1e-10
        assert relative_error(G, average.G) <= 1e-10


@pytest.mark.parametrize("settings", [ALL_KEPT, CUT], ids=["all", "cut"])
def test_b3_overwritten_at_every_update_it_is_rs_kfac(settings: dict[str, Any]) -> None:
    """algorithms.md 10.3, T_R = T_B, with the same seed."""
    increments, averages = folding_sequence(RAGGED, q=Q, p=P, room=ROOM)
    shared = {name: value for name, value in settings.items() if name != "increment_rows"}
    for attempt, average in zip(run_chain("b-r-kfac", increments, **settings), averages, strict=True):
        assert relative_error(spectrum_of(attempt).apply(V, 1e-2), rs_kfac(average, **shared)) <= 1e-10


def test_b3_of_full_rank_it_is_rs_kfac_of_full_rank() -> None:
    increments, averages = folding_sequence(RAGGED, q=Q, p=P, room=ROOM)
    for attempt, average in zip(run_chain("b-r-kfac", increments, rank=Q), averages, strict=True):
        assert relative_error(spectrum_of(attempt).apply(V, 1e-2), rs_kfac(average, rank=Q)) <= 1e-10


def test_without_a_correction_b_kfac_c_is_b_kfac() -> None:
    """algorithms.md 10.4."""
    increments, _ = folding_sequence(RAGGED, q=Q, p=P, room=ROOM)
    plain, skipped = (
        run_chain("b-kfac", increments, **CUT),
        run_chain("b-kfac-c", increments, **CUT, correction_fraction=0.0),
    )
    for one, other in zip(plain, skipped, strict=True):
        expected, found = tensor_fields(one.preconditioner), tensor_fields(other.preconditioner)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("truncate", ["before", "after"])
def test_truncation_cuts_where_it_says(truncate: str) -> None:
    increments, _ = folding_sequence(RAGGED, q=Q, p=P, room=ROOM, dense_at=lambda k: False)
    S, weight = torch.zeros(1, Q, Q, dtype=torch.float64), 0.0
    widths = []
    for attempt, increment in zip(run_chain("b-kfac", increments, **CUT, truncate=truncate), increments, strict=True):
        if truncate == "before":
            S = leading_part(S, 8, continued=False)
        S = increment.decay * S + increment.A_rows.mT @ increment.A_rows
        if truncate == "after":
            S = leading_part(S, 8, continued=False)
        weight = float(increment.decay) * weight + float(increment.examples)
        assert relative_error(represented(attempt)[0], S / weight) <= 1e-10
        widths.append(spectrum_of(attempt).w_A.shape[-1])
    # What was kept, and a column for each row that isn't zero: the buffer's other rows leave no trace.
    assert widths == ([6, 6 + 3, 8 + 6, 8 + 1, 8 + 5, 8 + 6] if truncate == "before" else [6, 8, 8, 8, 8, 8])


@pytest.mark.parametrize("method", METHODS)
def test_what_is_applied_has_the_pairs_that_are_needed_and_what_is_held_has_all(method: str) -> None:
    increments, _ = folding_sequence(RAGGED * 2, q=Q, p=P, room=ROOM)
    damping = 1e4
    settings: dict[str, Any] = {**ALL_KEPT, "truncate": "after", "damping": damping}
    whole = run_chain(method, increments, **settings, direction_error=0)[-1]
    cut = run_chain(method, increments, **settings)[-1]
    assert spectrum_of(whole).w_A.shape[-1] == 40 and spectrum_of(cut).w_A.shape[-1] == 32
    assert all(torch.equal(cut.state[name], tensor) for name, tensor in whole.state.items())
    error = relative_error(spectrum_of(cut).apply(V, damping), spectrum_of(whole).apply(V, damping))
    assert 0 < error <= cut.diagnostics["direction_error"] <= 0.05


def test_the_trace_is_that_of_the_whole_average_though_it_is_cut() -> None:
    increments, averages = folding_sequence(RAGGED, q=Q, p=P, room=ROOM, dense_at=lambda k: k == 2)
    for method in METHODS:
        for attempt, average in zip(run_chain(method, increments, **CUT, truncate="after"), averages, strict=True):
            trace = average.A.diagonal(dim1=-2, dim2=-1).sum(-1)
            assert relative_error(spectrum_of(attempt).trace_A, trace) <= 1e-12


def test_a_correction_brings_the_factors_nearer_to_the_average() -> None:
    counts = [6] * 12
    increments, averages = folding_sequence(counts, q=Q, p=P, room=ROOM, dense_at=lambda k: k == 11, spectrum=0.95)
    *before, last = run_chain("b-kfac", increments, **CUT)
    overwritten = run_chain("b-r-kfac", increments, **CUT | {"rank": 14})[-1]
    for fraction in (0.2, 0.5, 1.0):
        inverter = make_inverter("b-kfac-c", **CUT, correction_fraction=fraction)
        corrected = inverter.invert(increments[-1], damping=1e-2, previous=before[-1].state, seed=5)
        for side, truth in enumerate((averages[-1].A, averages[-1].G)):
            plain, after = (relative_error(represented(each)[side], truth) for each in (last, corrected))
            assert after < plain
            assert relative_error(represented(overwritten)[side], truth) < after
        assert corrected.diagnostics["approximation_error_A"] == pytest.approx(
            relative_error(represented(corrected)[0], averages[-1].A), rel=0.3
        )


def test_a_dropped_batch_only_decays() -> None:
    increments, _ = folding_sequence([6, 6, 0, 6], q=Q, p=P, room=ROOM, dense_at=lambda k: False)
    before, dropped = run_chain("b-kfac", increments, **CUT)[1:3]
    rho = increments[2].decay
    assert torch.equal(dropped.state["w_A"], rho * before.state["w_A"])
    assert torch.equal(dropped.state["weight_A"], rho * before.state["weight_A"])
    assert torch.equal(dropped.state["U_A"], before.state["U_A"])
    assert relative_error(spectrum_of(dropped).apply(V, 1e-2), spectrum_of(before).apply(V, 1e-2)) <= 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_nothing_measured_yet_is_a_failure_with_a_reason_and_harms_nothing_later(method: str) -> None:
    increments, averages = folding_sequence([0, 0, 6, 3], q=Q, p=P, room=ROOM, dense_at=lambda k: False)
    attempts = run_chain(method, increments, **ALL_KEPT)
    for attempt in attempts[:2]:
        assert attempt.outcome is Outcome.FAILED
        assert "factor A holds no examples" in attempt.reason
    assert relative_error(represented(attempts[-1])[0], averages[-1].A) <= 1e-10
    absent = replace(increments[3], A_rows=torch.zeros(1, 0, Q, dtype=torch.float64))
    failed = make_inverter(method).invert(absent, damping=1e-2, previous={}, seed=0)
    assert failed.outcome is Outcome.FAILED
    assert "factor A was not measured yet" in failed.reason


def without_rows_of_G(increment: Increment, *, dense: bool) -> Increment:
    empty = torch.zeros(1, 0, P, dtype=torch.float64)
    return replace(increment, G_rows=empty, G=increment.G if dense else torch.zeros(1, 0, 0, dtype=torch.float64))


def test_a_factor_too_small_for_brand_is_held_between_its_decompositions() -> None:
    increments, averages = folding_sequence(RAGGED, q=Q, p=P, room=ROOM)
    absent = torch.zeros(1, 0, 0, dtype=torch.float64)
    mixed = [
        replace(without_rows_of_G(increment, dense=k % 3 == 0), A=absent) for k, increment in enumerate(increments)
    ]
    for k, attempt in enumerate(run_chain("b-kfac", mixed, **ALL_KEPT)):
        A, G = represented(attempt)
        assert relative_error(A, averages[k].A) <= 1e-10
        assert relative_error(G, averages[k - k % 3].G) <= 1e-10
        assert (
            relative_error(spectrum_of(attempt).trace_G, averages[k - k % 3].G.diagonal(dim1=1, dim2=2).sum(1)) < 1e-12
        )
        assert "weight_G" not in attempt.state


def test_a_spoiled_basis_is_repaired_and_counted() -> None:
    increments, averages = folding_sequence(RAGGED, q=Q, p=P, room=ROOM, dense_at=lambda k: False)
    inverter = make_inverter("b-kfac", **ALL_KEPT)
    last = run_chain("b-kfac", increments[:5], **ALL_KEPT)[-1]
    clean = inverter.invert(increments[5], damping=1e-2, previous=last.state, seed=5)
    assert clean.diagnostics["repairs_A"] == 0.0
    columns = last.state["U_A"].shape[-1]
    shear = torch.eye(columns, dtype=torch.float64) + 0.01 * gaussian(columns, columns, seed=7)
    spoiled = {**last.state, "U_A": last.state["U_A"] @ shear}
    expected = spoiled["U_A"] @ torch.diag_embed(last.state["w_A"]) @ spoiled["U_A"].mT
    expected = increments[5].decay * expected + increments[5].A_rows.mT @ increments[5].A_rows
    attempt = inverter.invert(increments[5], damping=1e-2, previous=spoiled, seed=5)
    assert attempt.diagnostics["repairs_A"] == 1.0
    assert attempt.diagnostics["repairs_G"] == 0.0
    assert attempt.diagnostics["orthogonality_A"] <= 1e-12
    assert attempt.diagnostics["residual_A"] <= 1e-12
    assert relative_error(represented(attempt)[0] * attempt.state["weight_A"], expected) <= 1e-12
    assert float(orthogonality_error(spoiled["U_A"])) > 1e-3


@pytest.mark.parametrize("jobs", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_float32_stays_orthonormal_and_accurate_over_many_jobs(jobs: int) -> None:
    counts = [16 if k % 7 else 5 for k in range(jobs)]
    make = {"q": 120, "p": 100, "room": 16, "decay": 0.95, "spectrum": 0.7, "dense_at": lambda k: False}
    increments, averages = folding_sequence(counts, dtype=torch.float32, **make)
    inverter, state = make_inverter("b-kfac", rank=20, increment_rows=16), {}
    for increment in increments:
        outcome = invert_with_ladder(inverter, increment, damping=1e-2, previous=state, seed=3)
        state = outcome.state
        assert outcome.outcome is Outcome.DONE and outcome.diagnostics["rung"] == 0.0
        assert outcome.diagnostics["orthogonality_A"] < 1e-4 and outcome.diagnostics["orthogonality_G"] < 1e-4
        assert outcome.diagnostics["repairs_A"] == 0.0
    assert isinstance(outcome.preconditioner, KroneckerSpectrum)
    found = outcome.preconditioner
    assert relative_error(found.U_A @ torch.diag_embed(found.w_A) @ found.U_A.mT, averages[-1].A) < 1e-3


def test_a_state_in_another_precision_is_taken_over() -> None:
    """The ladder repeats a float32 job in float64 on the float32 state, and leaves a float64 state to the next job."""
    make: dict[str, Any] = {"q": Q, "p": P, "room": ROOM, "dense_at": lambda k: False}
    exact, single = (folding_sequence(RAGGED, dtype=dtype, **make)[0] for dtype in (torch.float64, torch.float32))
    inverter = make_inverter("b-kfac", **ALL_KEPT)
    expected = run_chain("b-kfac", exact[:2], **ALL_KEPT)[-1]
    state = run_chain("b-kfac", single[:1], **ALL_KEPT)[-1].state
    repeated = inverter.invert(exact[1], damping=1e-2, previous=state, seed=5)
    following = inverter.invert(single[1], damping=1e-2, previous=repeated.state, seed=5)
    assert relative_error(represented(repeated)[0], represented(expected)[0]) <= 1e-6
    assert {tensor.dtype for tensor in tensor_fields(following.preconditioner).values()} == {torch.float32}


def test_a_smaller_rank_in_the_settings_acts_at_once() -> None:
    increments, _ = folding_sequence(RAGGED, q=Q, p=P, room=ROOM, dense_at=lambda k: False)
    state = run_chain("b-kfac", increments[:5], **ALL_KEPT)[-1].state
    attempt = make_inverter("b-kfac", **CUT).invert(increments[5], damping=1e-2, previous=state, seed=5)
    assert spectrum_of(attempt).w_A.shape[-1] == 14


def test_adaptive_rank_grows_fast_and_shrinks_slowly() -> None:
    """Flat spectra lose much at the cut: 10 more. Steep ones carry ballast: 5 fewer, never below 70."""
    settings = {"rank": 80, "adaptive_rank": True, "increment_rows": 20}
    make: dict[str, Any] = {"q": 160, "p": 150, "room": 20, "dense_at": lambda k: False, "decay": 0.99}
    flat, _ = folding_sequence([20] * 8, **make)
    ranks = [int(attempt.state["rank_A"]) for attempt in run_chain("b-kfac", flat, **settings)]
    assert ranks == [80, 80, 80, 80, 90, 100, 110, 120]
    steep, _ = folding_sequence([20] * 8, spectrum=0.9, **make)
    ranks = [int(attempt.state["rank_A"]) for attempt in run_chain("b-kfac", steep, **settings)]
    assert ranks == [80, 80, 80, 75, 70, 70, 70, 70]


@pytest.mark.parametrize("rule", ["pi", "relative"])
def test_b5_the_inverse_on_the_rows_is_the_inverse_on_their_gradient(rule: str) -> None:
    increments, _ = folding_sequence(RAGGED, q=Q, p=P, room=ROOM, dense_at=lambda k: False)
    settings = {**CUT, "damping_rule": rule, "spectrum_continuation": True}
    found = spectrum_of(run_chain("b-kfac", increments, **settings)[-1])
    a, g = gaussian(1, 9, Q, seed=1), gaussian(1, 9, P, seed=2)
    assert relative_error(found.apply_to_rows(a, g, 9, 1e-2), found.apply(g.mT @ a / 9, 1e-2)) <= 1e-12
    assert found.apply_to_rows(a.float(), g.float(), 9, 1e-2).dtype == torch.float32


def test_rows_that_cannot_be_used_are_refused() -> None:
    increments, _ = folding_sequence([6], q=Q, p=P, room=ROOM)
    a, g = gaussian(1, 9, Q, seed=1), gaussian(1, 9, P, seed=2)
    common = spectrum_of(run_chain("b-kfac", increments, **CUT | {"damping_rule": "common"})[0])
    with pytest.raises(ValueError, match="'common' doesn't split into factors"):
        common.apply_to_rows(a, g, 9, 1e-2)
    found = spectrum_of(run_chain("b-kfac", increments, **CUT)[0])
    for some_a, some_g in ((a[..., 1:], g), (a, g[..., 1:])):
        with pytest.raises(ValueError, match=r"must be \(1, 9, 60\) and \(1, 9, 50\)"):
            found.apply_to_rows(some_a, some_g, 9, 1e-2)
