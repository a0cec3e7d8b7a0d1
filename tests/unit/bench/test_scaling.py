"""`kfdist bench scale`: the model's arithmetic, and that assumptions are told with it."""

from types import SimpleNamespace
from typing import Any

import pytest

from kfdist.bench import scaling
from kfdist.bench.measuring import measured
from kfdist.bench.scaling import ScaleSettings, checked_numbers, describe, measure_scale, network_seconds, plot
from kfdist.errors import ConfigError

FAST = ScaleSettings(gigabytes_a_second=2.0, hop_microseconds=10.0)


@pytest.mark.parametrize(
    ("size", "collectives", "ranks", "seconds"),
    [(4e9, 0.0, 8, 2.0), (0.0, 3.0, 8, 3 * 6e-5), (0.0, 1.0, 1, 0.0), (2e9, 1.0, 4096, 1.0 + 24e-5)],
)
def test_bytes_take_their_time_and_each_collective_its_hops(
    size: float, collectives: float, ranks: int, seconds: float
):
    assert network_seconds(FAST, size, collectives, ranks) == pytest.approx(seconds)


COSTS = object()


def forecast(settings: ScaleSettings, ranks: int, owners: int, costs: Any) -> Any:
    """Stands for plan's forecast, which has tests of its own and takes seconds; what was measured is used again."""
    assert costs is (None if (ranks, owners) == (2, 4) else COSTS)
    part = 2 * (ranks - 1) / ranks
    wire = {"gradients": 100e6 * part, "statistics": 3e6 * part, "snapshots": 1e6, "table": 200.0, "jobs": None}
    ages = SimpleNamespace(busy=(1 / owners,), steps=100, mean_steps=50.0, replaced=0.0, first_seconds=20 / owners)
    return SimpleNamespace(
        title="a run",
        remarks=("a remark",),
        blocks=[SimpleNamespace(owner=number % owners) for number in range(50)],
        traffic=[SimpleNamespace(purpose=purpose, wire=size) for purpose, size in wire.items()],
        ages=[SimpleNamespace(ages=ages)],
        owners=[SimpleNamespace(bytes=1000)],
        by_method={"rs-kfac": 20.0},
        threads=4,
        costs=COSTS,
    )


def test_a_run_is_calculated_and_shown_with_its_assumptions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scaling, "_forecast", forecast)
    settings = ScaleSettings(ranks=(2, 1024), owners=(1, 4))
    found = measured(lambda: measure_scale(settings))
    few, many = found["by_ranks"]
    assert few["share_of_gradient"] == 0.04
    assert many["share_of_gradient"] == pytest.approx(0.035, rel=0.01)
    assert few["seconds_a_step"] == pytest.approx(4.0002e6 / 25e9 + 2 * 2 * 5e-6)  # 1 + 2 x 50/100 collectives
    assert [each["first_step_seconds"] for each in found["by_owners"]] == [20.0, 5.0]
    shown = describe(found)
    assert all(sentence in shown for sentence in (*settings.assumptions(), "a remark"))
    assert "owners" in plot(found)


def test_numbers_are_taken_once_and_rising():
    assert checked_numbers([8, 2, 8], (1,)) == (2, 8)
    assert checked_numbers(None, (1, 4)) == (1, 4)


@pytest.mark.parametrize("given", [{"step_seconds": 0.0}, {"ranks": (0, 4)}, {"owners": ()}])
def test_wrong_settings_are_refused(given: dict):
    with pytest.raises(ConfigError, match=f"--{next(iter(given)).replace('_', '-')}"):
        ScaleSettings(**given)
