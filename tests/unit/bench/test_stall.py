"""`kfdist bench stall`: who is slowed, and by how much."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kfdist.bench.stall import StallSettings, Throttle
from kfdist.errors import ConfigError
from tests.support.waits import eventually


@pytest.fixture
def sleeper() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process.pid
    process.kill()
    process.wait()


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def share_stopped(pid: int) -> float:
    found = []
    for _ in range(200):
        found.append(is_stopped(pid))
        time.sleep(0.005)
    return sum(found) / len(found)


def test_what_is_slowed_is_stopped_most_of_the_time_and_goes_on_afterwards(sleeper: int):
    ended = subprocess.Popen(["true"])
    ended.wait()
    throttle = Throttle([ended.pid, sleeper], slowdown=10)
    try:
        assert not is_stopped(sleeper)
        with throttle.slowed():
            eventually(lambda: is_stopped(sleeper), bool, seconds=60)  # its process imports torch first
            assert 0.6 < share_stopped(sleeper) < 1.0
    finally:
        throttle.close()
    assert not is_stopped(sleeper)


def test_a_slowdown_is_at_least_two():
    with pytest.raises(ConfigError, match="--slowdown"):
        StallSettings(slowdown=1)
