"""Asap and FixedLag: which bounds make sense, and that being beyond one is never silent."""

from typing import Any, get_args

import pytest
from hypothesis import given, strategies

from kfdist.errors import ConfigError
from kfdist.policies.staleness import SMALLEST_DELAY, Asap, AtHardBound, Decision, FixedLag, oldest

steps = strategies.integers(1, 1000)
bounds = strategies.none() | steps
modes = strategies.sampled_from(get_args(AtHardBound))


@given(soft=bounds, hard=bounds, mode=modes, staleness=strategies.integers(0, 3000))
def test_staleness_is_within_the_bounds_or_the_policy_is_visibly_in_force(
    soft: int | None, hard: int | None, mode: AtHardBound, staleness: int
) -> None:
    if soft is not None and hard is not None:
        soft, hard = min(soft, hard), max(soft, hard)
    decision = Asap(soft_bound=soft, hard_bound=hard, at_hard_bound=mode).decide(staleness)
    beyond_soft = soft is not None and staleness > soft
    beyond_hard = hard is not None and staleness > hard
    assert bool(decision.reasons) is (beyond_soft or beyond_hard)
    assert (decision.damping_factor > 1.0) is beyond_soft
    assert decision.beyond == (mode if beyond_hard else None)
    assert (decision.wait, decision.fallback) == (beyond_hard and mode == "wait", beyond_hard and mode == "fallback")


@given(soft=steps, staleness=strategies.integers(0, 3000))
def test_damping_grows_without_a_jump_at_the_soft_bound(soft: int, staleness: int) -> None:
    asap = Asap(soft_bound=soft)
    step = asap.decide(staleness + 1).damping_factor - asap.decide(staleness).damping_factor
    assert 0.0 <= step <= 1.0 / soft + 1e-12


@given(period=steps, short=strategies.integers(1, 1000), soft=strategies.booleans())
def test_a_bound_that_normal_operation_breaks_is_refused_with_the_smallest_legal_value(
    period: int, short: int, soft: bool
) -> None:
    def asap(bound: int) -> Asap:
        return Asap(soft_bound=bound) if soft else Asap(hard_bound=bound)

    smallest = oldest(period, SMALLEST_DELAY)
    with pytest.raises(ConfigError, match=f"the smallest legal value is {smallest}$"):
        asap(max(smallest - short, 1)).check(inverse_period=period)
    asap(smallest).check(inverse_period=period)


@given(lag=strategies.integers(0, 100), staleness=strategies.integers(0, 3000))
def test_a_fixed_lag_asks_for_nothing(lag: int, staleness: int) -> None:
    assert FixedLag(lag).decide(staleness) == Decision()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Asap(soft_bound=30, hard_bound=20), "soft_bound: is 30, above hard_bound = 20"),
        (lambda: Asap(at_hard_bound="panic"), "at_hard_bound: 'panic' .*; choose one of 'wait', 'keep', 'fallback'"),
        (lambda: Asap(hard_bound=0), "hard_bound: 0 .* at least 1"),
        (lambda: Asap(soft_bound=2.5), "soft_bound: 2.5 .* at least 1"),
        (lambda: Asap(wait_limit_seconds="1h"), "wait_limit_seconds: '1h' .* a number above 0"),
        (lambda: FixedLag(3, wait_limit_seconds=0), "wait_limit_seconds: 0 .* a number above 0"),
        (lambda: FixedLag(-1), "lag: -1 .* at least 0"),
        (lambda: FixedLag(True), "lag: True .* at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}"):
        make()
