"""Ages of inverses: of owners that keep up, of one that doesn't, and of jobs that others take the place of."""

from collections.abc import Mapping

import pytest
from torch import nn

from kfdist.forecast.owner_queue import deal, play
from kfdist.policies.assignment import assign
from kfdist.policies.schedule import Schedule
from kfdist.policies.staleness import oldest
from kfdist.runtime.plan.groups import BlockGroup
from tests.support.plans import planned

GROUPS = planned(nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)]), "kfac").groups
SCHEDULE = Schedule(factor_period=2, inverse_period=12, groups=len(GROUPS))
STEP = 0.1
DELAY = 3


def _play(owners: int, seconds: float | Mapping[str, float]):
    dealt = deal(GROUPS, owners, "round_robin")

    def taken(group: BlockGroup) -> float:
        return seconds if isinstance(seconds, float) else seconds[group.name]

    return play(GROUPS, SCHEDULE, dealt, taken, STEP, DELAY)


def test_inversions_in_no_time_leave_the_least_age() -> None:
    ages = _play(2, 1e-6)
    assert ages.delay_steps == DELAY
    assert ages.steps == oldest(12, DELAY)
    assert ages.replaced == 0
    assert max(ages.busy) < 0.01


def test_an_inversion_of_some_steps_makes_inverses_so_much_older() -> None:
    quick, slow = _play(6, 1e-6), _play(6, 0.5)
    assert slow.steps == quick.steps + 5
    assert slow.delay_steps == quick.delay_steps + 5
    assert slow.first_seconds == pytest.approx(0.5)


def test_one_owner_works_off_the_first_step_alone() -> None:
    assert _play(1, 0.5).first_seconds == pytest.approx(3.0)
    assert _play(2, 0.5).first_seconds == pytest.approx(1.5)


def test_owners_that_do_not_keep_up_replace_jobs_and_ages_grow() -> None:
    enough, few = _play(3, 0.35), _play(1, 0.35)  # 2.1 s of work in periods of 1.2 s
    assert enough.replaced == 0
    assert few.replaced == pytest.approx(1 - 1.2 / 2.1, abs=0.05)
    assert enough.mean_steps < enough.steps
    assert few.steps > enough.steps
    assert few.busy == (1.0,)


def test_what_one_owner_does_is_no_matter_of_the_others() -> None:
    dealt = deal(GROUPS, 2, "round_robin")
    seconds = {group.name: 1.0 if dealt[group.name] == 0 else 1e-6 for group in GROUPS}
    ages = _play(2, seconds)
    assert ages.busy[0] > 0.9 and ages.busy[1] < 0.01


@pytest.mark.parametrize("policy", ["round_robin", "model_order", "lpt"])
def test_groups_are_dealt_as_a_run_deals_them(policy: str) -> None:
    named = assign([group.spec for group in GROUPS], ["pool-owner-0", "pool-owner-1", "pool-owner-2"], policy)
    assert {name: int(owner[-1]) for name, owner in named.items()} == deal(GROUPS, 3, policy)
    assert max(deal(GROUPS, 12, policy).values()) < 12
