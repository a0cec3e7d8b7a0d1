"""The staleness policy: which bounds make sense, and that being beyond one is never silent."""

import pytest
from hypothesis import given, strategies

from kfdist.errors import ConfigError
from kfdist.policies.staleness import AtHardBound, StalenessPolicy

steps = strategies.integers(1, 1000)
bounds = strategies.none() | steps
modes = strategies.sampled_from(AtHardBound)


@given(soft=bounds, hard=bounds, mode=modes, staleness=strategies.integers(0, 3000))
def test_staleness_is_within_the_bounds_or_the_policy_is_visibly_in_force(
    soft: int | None, hard: int | None, mode: AtHardBound, staleness: int
) -> None:
    decision = StalenessPolicy(soft_bound=soft, hard_bound=hard, at_hard_bound=mode).decide(staleness)
    beyond_soft = soft is not None and staleness > soft
    beyond_hard = hard is not None and staleness > hard
    assert bool(decision.reasons) is (beyond_soft or beyond_hard)
    assert (decision.damping_factor > 1.0) is beyond_soft
    assert decision.beyond == (mode if beyond_hard else None)
    assert (decision.wait, decision.fallback) == (
        beyond_hard and mode is AtHardBound.WAIT,
        beyond_hard and mode is AtHardBound.FALLBACK,
    )


@given(soft=steps, staleness=strategies.integers(0, 3000))
def test_damping_grows_without_a_jump_at_the_soft_bound(soft: int, staleness: int) -> None:
    policy = StalenessPolicy(soft_bound=soft)
    step = policy.decide(staleness + 1).damping_factor - policy.decide(staleness).damping_factor
    assert 0.0 <= step <= 1.0 / soft + 1e-12


@given(period=steps, delay=strategies.integers(1, 10), short=strategies.integers(1, 1000), soft=strategies.booleans())
def test_a_bound_that_normal_operation_breaks_is_refused_with_the_smallest_legal_value(
    period: int, delay: int, short: int, soft: bool
) -> None:
    def policy(bound: int) -> StalenessPolicy:
        return StalenessPolicy(soft_bound=bound) if soft else StalenessPolicy(hard_bound=bound)

    smallest = period + delay
    with pytest.raises(ConfigError, match=f"the smallest legal value is {smallest}$"):
        policy(max(smallest - short, 0)).check(inverse_period=period, delay=delay)
    policy(smallest).check(inverse_period=period, delay=delay)


def test_a_fixed_lag_takes_no_bounds() -> None:
    StalenessPolicy().check(inverse_period=10, lag=4)
    with pytest.raises(ConfigError, match="^hard_bound: is 50; .* at most 14 steps .* remove the bound"):
        StalenessPolicy(hard_bound=50).check(inverse_period=10, lag=4)


def test_bounds_in_the_wrong_order_and_unknown_modes_are_refused() -> None:
    with pytest.raises(ConfigError, match="soft_bound: is 30, above hard_bound = 20"):
        StalenessPolicy(soft_bound=30, hard_bound=20).check(inverse_period=10)
    with pytest.raises(ConfigError, match="at_hard_bound: 'panic' .*; choose one of 'wait', 'keep', 'fallback'"):
        StalenessPolicy(hard_bound=20, at_hard_bound="panic")  # pyright: ignore[reportArgumentType]
    assert StalenessPolicy(at_hard_bound="keep").at_hard_bound is AtHardBound.KEEP  # pyright: ignore[reportArgumentType]
