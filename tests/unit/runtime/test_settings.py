"""Settings as ranks compare them."""

from dataclasses import replace
from typing import Any

import pytest

import kfdist
from kfdist.errors import ConfigError
from tests.support.plans import settings

SETTINGS = settings()


def test_schedules_are_compared_by_their_value_at_the_step():
    scheduled = replace(SETTINGS, damping=lambda step: 1e-3 * (step + 1))
    assert scheduled.canonical(0) == SETTINGS.canonical(0)
    assert scheduled.canonical(1)["damping"] == "0.002"
    assert scheduled.damping_at(1) == 0.002


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fisher", "mc"),
        ("weight_sharing", "reduce"),
        ("sampling", kfdist.Sampling(positions_budget=1)),
        ("adoption", kfdist.Asap(hard_bound=103, at_hard_bound="keep")),
        ("adoption", kfdist.FixedLag(0)),
        ("skip", ("a", "b")),
        ("lr", lambda step: 0.5),
    ],
)
def test_a_field_that_differs_is_the_only_one_that_does(name: str, value: Any):
    changed = replace(SETTINGS, **{name: value}).canonical(0)
    assert {key for key, text in SETTINGS.canonical(0).items() if changed[key] != text} == {name}


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), "0.1", True, [0.1]])
def test_other_learning_rates_are_refused(bad: Any):
    with pytest.raises(ConfigError, match="^lr: .* at least 0"):
        replace(SETTINGS, lr=bad)


def test_inverse_periods_may_follow_one_another():
    changing = replace(SETTINGS, inverse_period={0: 100, 500: 50})
    assert [(each.begin, each.inverse_period) for each in changing.schedules(3)] == [(0, 100), (500, 50)]
    with pytest.raises(ConfigError, match=r"^hard_bound: .*with inverse_period = 100 "):
        replace(changing, adoption=kfdist.Asap(hard_bound=60))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({10: 20}, r"begins at the steps \[10\]; give rising ones, the first of them 0"),
        ({}, r"begins at the steps \[\]"),
        ({0: 20, 9: 30, 5: 20}, r"begins at the steps \[0, 9, 5\]"),
        ({0: 20, 0.5: 30}, "0.5.*whole number"),
        ({0: 20, 5: 15}, "is 15, which is no multiple of factor_period = 10"),
    ],
)
def test_other_inverse_periods_are_refused(bad: Any, words: str):
    with pytest.raises(ConfigError, match=f"^inverse_period: .*{words}"):
        replace(SETTINGS, inverse_period=bad)
