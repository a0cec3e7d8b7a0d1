"""What Brand's factors say of their directions holds against the whole moving averages, in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from kfdist.curvature import kept_pairs
from kfdist.curvature.inverse import KroneckerSpectrum
from kfdist.curvature.inverter import Inversion
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.statistics import Increment, KroneckerFactors
from kfdist.linalg.kronecker import DampingRule
from tests.support.increments import folding_sequence, run_chain
from tests.support.tiers import in_turn

Q, P, ROOM = 14, 11, 3
CUT: dict[str, Any] = {"rank": 4, "increment_rows": ROOM, "oversampling": Q}
METHODS = ("b-kfac", "b-r-kfac", "b-kfac-c")
RULES: tuple[DampingRule, ...] = ("pi", "relative", "common")
STREAMS = {
    # Counts of rows, ratio of neighbouring deviations, decay.
    "flat": ([3] * 16, 1.0, 0.95),
    "slowly falling": ([3, 1, 0, 2, 3, 3] * 3, 0.97, 0.9),
    "fast falling": ([2, 3] * 6, 0.6, 0.8),
}


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets factors as small as these be cut off, too."""
    monkeypatch.setattr(kept_pairs, "MULTIPLE", 4)


def made_by(attempt: Inversion) -> KroneckerSpectrum:
    assert isinstance(attempt.preconditioner, KroneckerSpectrum), attempt.reason
    return attempt.preconditioner


def largest_error(attempt: Inversion, average: KroneckerFactors, rule: DampingRule, damping: float) -> float:
    """Returns the largest change that any direction has, of those of the whole average, relative to itself."""
    made = made_by(attempt)
    kept = [
        U[0] @ torch.diag(w[0] - tail[0]) @ U[0].mT + tail[0] * torch.eye(len(U[0]), dtype=w.dtype)
        for U, w, tail in ((made.U_A, made.w_A, made.tail_A), (made.U_G, made.w_G, made.tail_G))
    ]
    eye_A, eye_G = torch.eye(Q, dtype=torch.float64), torch.eye(P, dtype=torch.float64)
    if rule == "common":
        joint = damping * torch.eye(P * Q, dtype=torch.float64)
        exact, found = torch.kron(average.G[0], average.A[0]) + joint, torch.kron(kept[1], kept[0]) + joint
    else:
        of_A, of_G = (float(each) for each in made.factor_damping(damping))
        exact = torch.kron(average.G[0] + of_G * eye_G, average.A[0] + of_A * eye_A)
        found = torch.kron(kept[1] + of_G * eye_G, kept[0] + of_A * eye_A)
    return float(torch.linalg.matrix_norm(torch.linalg.solve(found, exact - found), 2))


@pytest.mark.parametrize(("method", "stream"), in_turn(METHODS, STREAMS, of=3))
def test_no_direction_is_farther_off_than_stated(method: str, stream: str) -> None:
    cut, (counts, spectrum, decay) = 0, STREAMS[stream]
    increments, averages = folding_sequence(
        counts, q=Q, p=P, room=ROOM, decay=decay, spectrum=spectrum, dense_at=lambda k: k % 4 == 3
    )
    for truncate, damping in (("after", 1e-3), ("before", 30.0)):
        chain = run_chain(method, increments, **CUT, truncate=truncate)
        for rule in RULES:  # what a job leaves to the next depends neither on it nor on the damping
            inverter = make_inverter(method, **CUT, truncate=truncate, damping_rule=rule)
            for k in range(2, len(counts), 3):
                attempt = inverter.invert(increments[k], damping=damping, previous=chain[k - 1].state, seed=5)
                error = largest_error(attempt, averages[k], rule, damping)
                stated = attempt.diagnostics["direction_error"]
                assert error <= stated * (1 + 1e-9) + 1e-9, (rule, truncate, damping)
                assert attempt.diagnostics["limited_by_rank"] == (stated > 0.05)
                cut += made_by(attempt).least_damping > 0
    assert cut, "no snapshot has fewer pairs than were found"


@pytest.mark.parametrize("truncate", ["before", "after"])
def test_it_states_little_more_than_is_true(truncate: str) -> None:
    """The bound follows a flat spectrum, of which most is cut off, within a factor; and is 0 until anything is."""
    increments, averages = folding_sequence([3] * 20, q=Q, p=P, room=ROOM, decay=0.95, dense_at=lambda k: False)
    done = run_chain("b-kfac", increments, **CUT, truncate=truncate, damping_rule="pi", damping=1.0)
    assert done[0].diagnostics["direction_error"] == 0
    error = largest_error(done[-1], averages[-1], "pi", 1.0)
    assert 0.5 < error <= done[-1].diagnostics["direction_error"] <= 10 * error


@pytest.mark.parametrize("method", METHODS)
def test_an_older_checkpoint_goes_on_with_a_bound_that_holds_and_becomes_as_small(method: str) -> None:
    increments, averages = folding_sequence([3] * 40, q=Q, p=P, room=ROOM, decay=0.7, dense_at=lambda k: k % 8 == 7)
    inverter, damping = make_inverter(method, **CUT, damping_rule="pi"), 1.0
    whole = run_chain(method, increments, **CUT, damping_rule="pi", damping=damping)
    state = {name: each for name, each in whole[9].state.items() if not name.startswith("missing_")}
    assert len(state) == len(whole[9].state) - 2
    stated = float("inf")
    for k in range(10, 40):
        attempt = inverter.invert(increments[k], damping=damping, previous=state, seed=5)
        state = dict(attempt.state)
        stated = attempt.diagnostics["direction_error"]
        assert largest_error(attempt, averages[k], "pi", damping) <= stated * (1 + 1e-9)
    assert stated <= 1.01 * whole[-1].diagnostics["direction_error"]


def test_the_bound_is_that_of_the_worse_group() -> None:
    both, _ = folding_sequence([3] * 12, q=Q, p=P, room=ROOM, dense_at=lambda k: False, c=2)
    each = [[_of_group(increment, group) for increment in both] for group in (0, 1)]
    alone = [run_chain("b-kfac", increments, **CUT, damping=1.0)[-1] for increments in each]
    together = run_chain("b-kfac", both, **CUT, damping=1.0)[-1]
    missing = [float(attempt.state["missing_A"]) for attempt in alone]
    assert together.state["missing_A"].tolist() == pytest.approx(missing) and missing[0] != missing[1]
    stated = [attempt.diagnostics["direction_error"] for attempt in alone]
    assert stated[0] != stated[1] and together.diagnostics["direction_error"] == pytest.approx(max(stated))


def _of_group(increment: Increment, group: int) -> Increment:
    only = {name: getattr(increment, name)[group : group + 1] for name in ("A_rows", "G_rows", "A", "G")}
    return replace(increment, **only)
