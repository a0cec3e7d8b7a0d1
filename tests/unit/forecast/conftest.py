"""Tests of what a plan says don't need it measured well."""

from functools import cache

import pytest

from kfdist.curvature.auto import measure_costs
from kfdist.forecast import forecast, inversion_costs, trial_steps

_measured_once = cache(measure_costs)
"""What this machine computes with takes a third of a second to measure, which a plan does up to twice."""


@pytest.fixture(autouse=True)
def _little_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_steps, "_SECONDS", 0.0)
    monkeypatch.setattr(inversion_costs, "_BUDGET", 0.0)
    for module in (forecast, inversion_costs):
        monkeypatch.setattr(module, "measure_costs", _measured_once)
