"""When groups are folded and inverted: properties over all legal periods, against counting by hand."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfdist.errors import ConfigError
from kfdist.policies.schedule import Schedule


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    factor_period = draw(st.integers(1, 12))
    return Schedule(
        factor_period=factor_period,
        inverse_period=factor_period * draw(st.integers(1, 12)),
        groups=draw(st.integers(1, 40)),
    )


@given(schedules())
def test_every_group_is_folded_and_inverted_at_step_0(schedule: Schedule):
    assert all(schedule.folds(group, 0) and schedule.inverts(group, 0) for group in range(schedule.groups))


@given(schedules(), st.data())
def test_foldings_until_counts_the_foldings(schedule: Schedule, data: st.DataObject):
    group = data.draw(st.integers(0, schedule.groups - 1))
    count = 0
    for step in range(3 * schedule.inverse_period + 2):
        count += schedule.folds(group, step)
        assert schedule.count_until(group, step, schedule.factor_period) == count


@given(schedules(), st.integers(1, 50), st.data())
def test_a_schedule_that_begins_later_does_the_same_later(schedule: Schedule, begin: int, data: st.DataObject):
    group, later = data.draw(st.integers(0, schedule.groups - 1)), replace(schedule, begin=begin)
    for step in range(3 * schedule.inverse_period):
        assert later.folds(group, begin + step) == schedule.folds(group, step)
        assert later.inverts(group, begin + step) == schedule.inverts(group, step)
        for period in (schedule.factor_period, schedule.inverse_period):
            assert later.count_until(group, begin + step, period) == schedule.count_until(group, step, period)


@given(schedules(), st.data())
def test_an_inversion_sees_a_fresh_folding(schedule: Schedule, data: st.DataObject):
    group = data.draw(st.integers(0, schedule.groups - 1))
    for step in range(3 * schedule.inverse_period):
        assert schedule.folds(group, step) or not schedule.inverts(group, step)


@given(schedules(), st.data())
def test_after_the_first_step_both_recur_with_their_period(schedule: Schedule, data: st.DataObject):
    group = data.draw(st.integers(0, schedule.groups - 1))
    steps = range(1, 4 * schedule.inverse_period + 1)
    folded = [step for step in steps if schedule.folds(group, step)]
    inverted = [step for step in steps if schedule.inverts(group, step)]
    assert {b - a for a, b in zip(folded, folded[1:], strict=False)} <= {schedule.factor_period}
    assert {b - a for a, b in zip(inverted, inverted[1:], strict=False)} <= {schedule.inverse_period}
    # With step 0, nothing is ever older than its period.
    assert folded[0] <= schedule.factor_period
    assert inverted[0] <= schedule.inverse_period


@given(schedules())
def test_inversions_are_spread_evenly_over_the_period(schedule: Schedule):
    phases = [schedule.phase(group) for group in range(schedule.groups)]
    assert all(0 <= phase < schedule.inverse_period for phase in phases)
    busiest = max(phases.count(phase) for phase in phases)
    assert busiest == -(-schedule.groups // schedule.inverse_period), "no step has more than its share"
    gaps = [b - a for a, b in zip(phases, [*phases[1:], phases[0] + schedule.inverse_period], strict=True)]
    share, moved = schedule.inverse_period / schedule.groups, 2 * schedule.factor_period / schedule.groups
    assert all(abs(gap - share) < 1 + moved for gap in gaps)


@given(schedules())
def test_foldings_are_spread_evenly_over_their_period(schedule: Schedule):
    for step in range(1, schedule.factor_period + 1):
        folding = sum(schedule.folds(group, step) for group in range(schedule.groups))
        assert folding in (schedule.groups // schedule.factor_period, -(-schedule.groups // schedule.factor_period))


@pytest.mark.parametrize("groups", [5, 10, 20, 40])
def test_numbers_of_groups_that_divide_the_periods_have_due_steps_of_their_own(groups: int):
    schedule = Schedule(factor_period=10, inverse_period=100, groups=groups)
    for period, busiest in ((10, -(-groups // 10)), (20, -(-groups // 20)), (100, 1)):
        due = [sum(schedule.due(group, step, period) for group in range(groups)) for step in range(1, 101)]
        assert max(due) == busiest


def test_phases_are_exact_shares_of_the_period_where_these_spread_foldings_too():
    for groups in (1, 3, 7, 41, 107):
        schedule = Schedule(factor_period=10, inverse_period=100, groups=groups)
        assert [schedule.phase(group) for group in range(groups)] == [100 * group // groups for group in range(groups)]


@pytest.mark.parametrize("name", ["factor_period", "inverse_period"])
@pytest.mark.parametrize("bad", [0, -10, 2.5, "10", None, True])
def test_periods_are_whole_and_positive(name: str, bad: object):
    with pytest.raises(ConfigError, match=rf"{name}: .*at least 1"):
        Schedule(**{"factor_period": 1, "inverse_period": 1, "groups": 1, name: bad})  # type: ignore[arg-type]


@pytest.mark.parametrize(("inverse", "legal"), [(25, (20, 30)), (5, (10, 20)), (101, (100, 110))])
def test_an_inverse_period_between_multiples_is_refused_with_its_legal_neighbours(inverse: int, legal: tuple[int, int]):
    with pytest.raises(ConfigError, match=f"take {legal[0]} or {legal[1]}"):
        Schedule(factor_period=10, inverse_period=inverse, groups=3)
    for period in legal:
        Schedule(factor_period=10, inverse_period=period, groups=3)


@pytest.mark.parametrize("groups", [1, 3, 7, 40])
def test_groups_that_are_folded_together_are_inverted_with_a_fresh_folding(groups: int):
    schedule = Schedule(factor_period=5, inverse_period=20, groups=groups, together=True)
    for step in range(100):
        folded = {schedule.folds(group, step) for group in range(groups)}
        assert folded == {step % 5 == 0}
        assert step % 5 == 0 or not any(schedule.inverts(group, step) for group in range(groups))
    for group in range(groups):
        assert sum(schedule.inverts(group, step) for step in range(1, 101)) == 5
