"""Numbers as people read them."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

_BYTES = ("B", "kB", "MB", "GB", "TB", "PB")
_TIMES = ((86_400, "days"), (3600, "hours"), (60, "minutes"))


def number(value: Any) -> str:
    """Says a number with about four digits, a large one with all before the point; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or 1e3 <= abs(value) < 1e9 or (value.is_integer() and abs(value) < 1e3):
        return f"{round(value):,}"
    return f"{value:.4g}"


def share(value: float | None) -> str:
    """Says a share in percent."""
    return "–" if value is None else f"{100 * value:.2f} %"


def metric(name: str, value: float | None) -> str:
    """Says a metric: accuracies in percent."""
    return share(value) if name.endswith("accuracy") else number(value)


def seconds(value: float | None) -> str:
    """Says a duration in the unit that fits it."""
    if value is None or not math.isfinite(value):
        return "–"
    for factor, limit, unit in ((1e6, 1000, "µs"), (1e3, 1000, "ms"), (1.0, 120, "s")):
        if (shown := _three(value * factor)) < limit:
            return f"{shown:g} {unit}"
    if value < 7200:
        return f"{value / 60:.1f} min"
    return f"{value / 3600:.1f} h" if value < 172_800 else f"{value / 86_400:.1f} days"


def _three(value: float) -> float:
    """Rounds to three digits: what is then a thousand is said in the next unit."""
    return float(f"{value:.3g}")


def size(value: float) -> str:
    """Says bytes in the unit that fits them, in powers of 1000."""
    shown = _three(value)
    factor, unit = size_unit(shown)
    return f"{shown / factor:.4g} {unit}"


def size_unit(value: float) -> tuple[int, str]:
    """Returns the unit that fits so many bytes, as their number and its name."""
    power = 0 if value < 1 else min(int(math.log10(value) // 3), len(_BYTES) - 1)
    return 1000**power, _BYTES[power]


def time_unit(value: float) -> tuple[int, str]:
    """Returns the unit that fits so many seconds, as their number and its name."""
    return next((each for each in _TIMES if value >= 3 * each[0]), (1, "seconds"))


def moment(unix_time: float) -> str:
    """Says when it was, in UTC."""
    return datetime.fromtimestamp(unix_time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def listed(words: Sequence[str]) -> str:
    """Joins words as a sentence does."""
    return ", ".join(words[:-1]) + (" and " if len(words) > 1 else "") + "".join(words[-1:])


def counted(count: int, noun: str) -> str:
    """Says how many there are of something whose plural ends in s."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
