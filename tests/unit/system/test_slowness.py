"""What takes long is told while it does."""

import threading
import time

import pytest

from kfdist.system.slowness import told_while_long
from tests.support.waits import eventually


def test_what_takes_long_is_told_again_and_again_until_it_ends() -> None:
    told: list[float] = []
    with pytest.raises(ValueError), told_while_long(told.append, every_seconds=0.1):
        eventually(lambda: len(told), lambda count: count >= 2)
        raise ValueError
    assert 0.1 <= told[0] < told[1]
    count = len(told)
    time.sleep(0.3)
    assert len(told) <= count + 1
    assert not [each for each in threading.enumerate() if each.name == "kfdist-slowness"]


def test_what_is_done_at_once_is_not_told() -> None:
    told: list[float] = []
    with told_while_long(told.append, every_seconds=10.0):
        pass
    assert told == []
