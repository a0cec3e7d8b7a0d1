"""Waiting for what a test can't know the time of."""

import time
from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")


def eventually(look: Callable[[], Value], wanted: Callable[[Value], bool], *, seconds: float = 10.0) -> Value:
    """Looks until what it sees is as wanted; fails with the last sight."""
    ends = time.monotonic() + seconds
    while not wanted(seen := look()):
        assert time.monotonic() < ends, f"not as wanted after {seconds} s: {seen}"
        time.sleep(0.05)  # some looks take a hundredth of a second themselves
    return seen
