"""Which number the next start of a run may have at most. Older numbers are refused, so one huge one would end them all.

Starts have one of two kinds of numbers: a run directory counts them from 1; a library user's are given, or the clock's
milliseconds since 1970.
"""

MISSED_STARTS = 10_000
"""By how many starts a directory may be ahead of the controller, which was away or not reached by them."""

_COUNTED_BELOW = 10**9
"""No directory counts as far, and the clock said more than this in its first days of 1970."""

_DAY_MILLISECONDS = 24 * 60 * 60 * 1000
"""By how much clocks of two machines may differ."""


def largest_epoch(newest: int, *, in_directory: bool, now_ns: int) -> int:
    """Returns the largest number that a run's next start may have.

    Args:
        newest: That of its newest start; 0 if it has had none.
        in_directory: Whether the run is one of a run directory.
        now_ns: Nanoseconds since 1970.
    """
    if in_directory and 0 < newest < _COUNTED_BELOW:
        return newest + MISSED_STARTS
    return max(newest + 1, now_ns // 10**6 + _DAY_MILLISECONDS)
