"""Which members of a family of tests are run every time, and which in the slow tier."""

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def in_turn(*axes: Iterable[Any], of: int) -> list[Any]:
    """All combinations of the axes' values as parameters; one of so many is run every time, the others are slow.

    It is those whose places along the axes add up to a multiple of `of`: where no axis is shorter than that, each value
    is among them, and so is each with each of another axis where there are three axes or more.
    """
    places = product(*(list(enumerate(axis)) for axis in axes))
    return [
        pytest.param(*(value for _, value in each), marks=() if sum(i for i, _ in each) % of == 0 else pytest.mark.slow)
        for each in places
    ]
