"""Durations counted in bounded memory, which can be added up over windows, starts and ranks."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Self

_PER_OCTAVE = 8
_SHORTEST = 1e-7


class Durations:
    """A histogram of seconds with buckets 9 % wide, so that quantiles are right to 5 %.

    Attributes:
        count: How many durations there were.
        total: Their sum, exactly.
        largest: The longest, exactly.
        buckets: How many lie from 2 ** (n / 8) to 2 ** ((n + 1) / 8), by n.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.largest = 0.0
        self.buckets: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        """Counts one."""
        self.count += 1
        self.total += seconds
        self.largest = max(self.largest, seconds)
        self.buckets[math.floor(_PER_OCTAVE * math.log2(max(seconds, _SHORTEST)))] += 1

    def merge(self, other: "Durations") -> None:
        """Counts all that `other` has counted."""
        self.count += other.count
        self.total += other.total
        self.largest = max(self.largest, other.largest)
        self.buckets.update(other.buckets)

    @property
    def mean(self) -> float:
        """The mean; 0 before the first."""
        return self.total / self.count if self.count else 0.0

    def quantile(self, q: float) -> float:
        """Returns the duration that a share `q` of all is at most; 0 before the first."""
        left = max(1, math.ceil(q * self.count))
        for bucket, count in sorted(self.buckets.items()):
            left -= count
            if left <= 0:
                return min(2 ** ((bucket + 0.5) / _PER_OCTAVE), self.largest)
        return 0.0

    def shares(self) -> list[tuple[float, float]]:
        """Returns (seconds, share of all that are at most so long), rising."""
        seen, found = 0, []
        for bucket, count in sorted(self.buckets.items()):
            seen += count
            found.append((min(2 ** ((bucket + 1) / _PER_OCTAVE), self.largest), seen / self.count))
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        buckets = {str(bucket): count for bucket, count in sorted(self.buckets.items())}
        return {"total": round(self.total, 7), "largest": round(self.largest, 7), "buckets": buckets}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Returns what `to_json` was called of."""
        found = cls()
        found.total, found.largest = content["total"], content["largest"]
        found.buckets.update({int(bucket): count for bucket, count in content["buckets"].items()})
        found.count = found.buckets.total()
        return found
