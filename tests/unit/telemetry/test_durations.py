import json
import random

import pytest

from kfdist.telemetry.durations import Durations


def counted(seconds: list[float]) -> Durations:
    found = Durations()
    for each in seconds:
        found.add(each)
    return found


def test_quantiles_are_right_to_five_percent() -> None:
    dice = random.Random(0)
    seconds = [10 ** dice.uniform(-6, 2) for _ in range(5000)]
    found, ordered = counted(seconds), sorted(seconds)
    for q in (0.01, 0.5, 0.99):
        assert found.quantile(q) == pytest.approx(ordered[int(q * len(ordered)) - 1], rel=0.05)
    assert found.quantile(1.0) == pytest.approx(found.largest, rel=0.05)
    assert found.mean == pytest.approx(sum(seconds) / len(seconds))
    assert len(json.dumps(found.to_json())) < 4000


def test_parts_add_up_to_the_whole() -> None:
    seconds = [0.001 * n for n in range(1, 400)]
    whole, parts = counted(seconds), counted(seconds[:100])
    parts.merge(Durations.from_json(json.loads(json.dumps(counted(seconds[100:]).to_json()))))
    assert parts.to_json() == whole.to_json()
    assert parts.count == whole.count
    assert parts.shares() == whole.shares()
    assert whole.shares()[-1] == (whole.largest, 1.0)


def test_nothing_and_zero() -> None:
    assert (Durations().quantile(0.5), Durations().mean, Durations().shares()) == (0.0, 0.0, [])
    assert counted([0.0]).quantile(0.5) == 0.0
