"""`kfdist bench traffic`: what is said of what two ranks send."""

import pytest

from kfdist.bench.on_the_wire import TrafficSettings, describe, plot
from kfdist.bench.results import as_json
from kfdist.errors import ConfigError


def content(kfdist: float) -> dict[str, object]:
    counts = {
        "gradient_bytes_a_step": 200e6,
        "kfdist_bytes_a_step": kfdist,
        "kfdist_bytes_a_step_by_purpose": {"table": 1e3, "statistics": 2e6, "snapshots": kfdist - 2.001e6},
        "kfdist_over_gradient": kfdist / 200e6,
        "counted": "in a network namespace",
        "failed_inversions": 0,
        "goal": 0.04,
    }
    return {
        "config": {"model": "resnet50", "ranks": 2, "backend": "gloo", "factor_period": 10, "inverse_period": 100},
        "by_method": {"rs-kfac": counts},
        "hardware": {"cpu": "a CPU", "cores": 2},
        "versions": {"torch": "2"},
        "load_average": {"start": 0.0, "end": 0.0},
        "seconds": 1.0,
    }


def test_shares_are_told_beside_the_goal():
    assert "2.50%  4.0%" in describe(content(5e6))
    assert "statistics" in plot(content(5e6))


def test_lists_of_numbers_take_a_line():
    assert as_json({"a": [1, 2.5, -3e-9], "b": ["c"]}) == '{\n  "a": [1, 2.5, -3e-09],\n  "b": [\n    "c"\n  ]\n}'


@pytest.mark.parametrize(
    ("given", "message"), [({"model": "x"}, "--model: "), ({"inverse_period": 15}, "--inverse-period: .*15.*multiple")]
)
def test_wrong_settings_are_refused(given: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        TrafficSettings(**given)
