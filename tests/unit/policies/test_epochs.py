"""Which number a run's next start may have at most."""

import pytest

from kfdist.policies.epochs import largest_epoch

NOW_NS = 1_800_000_000 * 10**9
TOMORROW = 1_800_000_000_000 + 86_400_000


@pytest.mark.parametrize(
    ("newest", "in_directory", "most"),
    [
        (0, False, TOMORROW),
        (0, True, TOMORROW),  # under a new controller, after any number of starts
        (5, True, 10_005),
        (5, False, TOMORROW),  # a library user's own number
        (1_799_000_000_000, True, TOMORROW),  # of a library user, under a controller that a configuration announced
        (2 * TOMORROW, False, 2 * TOMORROW + 1),  # of a clock that was ahead
    ],
)
def test_the_next_start_is_near_the_newest_one_or_the_clock(newest: int, in_directory: bool, most: int) -> None:
    assert largest_epoch(newest, in_directory=in_directory, now_ns=NOW_NS) == most
