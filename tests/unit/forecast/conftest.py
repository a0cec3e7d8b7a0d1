"""Tests of what a plan says don't need it measured well."""

import pytest

from kfdist.forecast import inversion_costs, trial_steps


@pytest.fixture(autouse=True)
def _little_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_steps, "_SECONDS", 0.0)
    monkeypatch.setattr(inversion_costs, "_BUDGET", 0.0)
