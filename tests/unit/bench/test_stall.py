"""`kfdist bench stall`: who is slowed, and by how much."""

import signal
import subprocess
import sys
import time

import pytest

from kfdist.bench import stall
from kfdist.bench.stall import StallSettings
from kfdist.errors import ConfigError


def test_signals_reach_those_that_live():
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    ended = subprocess.Popen(["true"])
    ended.wait()
    try:
        stall._signal([ended.pid, sleeper.pid], signal.SIGSTOP)
        state = ""
        while state != "T":
            with open(f"/proc/{sleeper.pid}/stat") as file:
                state = file.read().rsplit(")", 1)[1].split()[0]
            time.sleep(0.001)
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_slowdown_is_at_least_two():
    with pytest.raises(ConfigError, match="--slowdown"):
        StallSettings(slowdown=1)
