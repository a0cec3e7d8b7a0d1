from collections.abc import Iterator
from pathlib import Path

import pytest

from kfdist.control.client import ControlClient
from tests.support.controller import ControllerThread, Member


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[ControllerThread]:
    with ControllerThread(tmp_path / "control.sqlite", lease_seconds=0.6) as running:
        yield running


@pytest.fixture
def client(controller: ControllerThread) -> Iterator[ControlClient]:
    with controller.client() as made:
        yield made


@pytest.fixture
def member(controller: ControllerThread) -> Iterator[Member]:
    with Member(controller.address) as made:
        yield made
