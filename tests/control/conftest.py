from collections.abc import Iterator
from pathlib import Path

import pytest

from kfdist.control.client import ControlClient
from tests.support.controller import ControllerThread, Member

LEASE_SECONDS = 0.6


@pytest.fixture
def controller(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ControllerThread]:
    """A controller with a short lease, or with the one given by indirect parametrisation."""
    lease_seconds = getattr(request, "param", LEASE_SECONDS)
    with ControllerThread(tmp_path / "control.sqlite", lease_seconds=lease_seconds) as running:
        yield running


@pytest.fixture
def client(controller: ControllerThread) -> Iterator[ControlClient]:
    with controller.client() as made:
        yield made


@pytest.fixture
def member(controller: ControllerThread) -> Iterator[Member]:
    with Member(controller.address) as made:
        yield made
