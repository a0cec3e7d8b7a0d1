import sys

import pytest

from kfdist.cli.main import run
from tests.support.launches import Train


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Train:
    """Runs `kfdist train` in this process, where torch is imported once for all; returns its exit code and its words.

    For what it refuses before it starts anything.
    """

    def run_it(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["kfdist", "train", *arguments])
        code = run()
        return code, "".join(capfd.readouterr())

    return run_it
