"""Runs that several tests look at, each trained once."""

from pathlib import Path

import pytest

from tests.support.recorded import record
from tests.support.training import FIXED_LAG


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything a report can show."""
    overrides = ("data.micro_batches=2", "run.eval_period=20", "checkpoint.period=20", "run.name=whole")
    # The same numbers however busy the machine is, and so the same warnings, which are errors here.
    overrides += FIXED_LAG
    return record(tmp_path_factory.mktemp("finished") / "run", *overrides)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a preconditioner."""
    overrides = ("preconditioner.method=none", "preconditioner.settings={}", "run.steps=5")
    return record(tmp_path_factory.mktemp("plain") / "run", *overrides)
