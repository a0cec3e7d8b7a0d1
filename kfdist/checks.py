"""Refusals of single values, each written once: the value received, what is allowed, and for words the nearest one.

Every check returns the value it was given, typed, or raises `ConfigError` with the field as its path.
"""

import difflib
import math
from collections.abc import Collection, Iterable
from typing import TypeGuard, TypeVar

from kfdist.errors import ConfigError

Word = TypeVar("Word", bound=str)


def is_number(value: object) -> TypeGuard[int | float]:
    """Says whether `value` is a plain number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Says whether `value` is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def number(
    field: str,
    value: object,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    finite: bool = True,
    hint: str = "",
) -> float:
    """Refuses what isn't a number within bounds; NaN never is.

    Args:
        field: Its path.
        value: What was given.
        above: Lower bound, itself excluded.
        least: Lower bound, itself allowed.
        below: Upper bound, itself excluded.
        most: Upper bound, itself allowed.
        finite: Whether infinity is refused.
        hint: What else is allowed, or what the number means; added in brackets.

    Raises:
        ConfigError: It isn't.
    """
    if (
        is_number(value)
        and not math.isnan(value)
        and not (finite and math.isinf(value))
        and (above is None or value > above)
        and (least is None or value >= least)
        and (below is None or value < below)
        and (most is None or value <= most)
    ):
        return value
    words = {"above": above, "at least": least, "below": below, "at most": most}
    bounds = " and ".join(f"{word} {bound}" for word, bound in words.items() if bound is not None)
    bounds = f"of {bounds}" if bounds.startswith("at") else bounds
    kind = "finite number" if finite and below is None and most is None else "number"
    raise _refusal(field, value, f"must be a {kind} {bounds}".rstrip(), hint)


def count(field: str, value: object, *, least: int, hint: str = "") -> int:
    """Refuses what isn't a whole number of at least `least`; arguments and error are those of `number`."""
    if not is_whole(value) or value < least:
        raise _refusal(field, value, f"must be a whole number of at least {least}", hint)
    return value


def choice(field: str, value: object, allowed: Collection[Word], *, hint: str = "") -> Word:
    """Refuses a word that isn't one of those allowed, and suggests the nearest; arguments and error as for `number`."""
    for word in allowed:
        if word == value:
            return word
    rule = f"choose one of {', '.join(map(repr, allowed))}"
    raise _refusal(field, value, rule, hint, suggestion(value, allowed) if isinstance(value, str) else "")


def switch(field: str, value: object) -> bool:
    """Refuses what is neither true nor false."""
    if not isinstance(value, bool):
        raise _refusal(field, value, "must be true or false")
    return value


def suggestion(word: str, known: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the nearest known word, whatever its case, or nothing."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""


def _refusal(field: str, value: object, rule: str, hint: str = "", suggested: str = "") -> ConfigError:
    bracket = f" ({hint})" if hint else ""
    return ConfigError(f"{value!r} is not allowed; {rule}{bracket}{suggested}", path=field)
