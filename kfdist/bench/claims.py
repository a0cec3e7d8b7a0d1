"""A claim of a paper, what was measured of it, and the verdict that follows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """What a measurement says of a claim."""

    SHOWN = "shown"
    NOT_SHOWN = "not shown"
    IMPOSSIBLE = "can't be run here"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One statement of a claim, by a rule that was written down before anything was measured.

    Attributes:
        statement: What is to hold, with its bound.
        holds: Whether it does; None if it couldn't be measured here.
        seen: What was measured, in words and numbers.
    """

    statement: str
    holds: bool | None
    seen: str


@dataclass(frozen=True, kw_only=True)
class ClaimResult:
    """What one claim's measurement gave.

    Attributes:
        claim: Its letter.
        title: The claim, with its source.
        parts: Its statements, at least one.
        figures: What was measured, as JSON values.
        conditions: On what it was measured: sizes, settings, data.
    """

    claim: str
    title: str
    parts: tuple[Part, ...]
    figures: dict[str, Any]
    conditions: dict[str, Any]

    @property
    def verdict(self) -> Verdict:
        """What follows from the parts; see `verdict_of`."""
        return verdict_of(self.parts)

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON values, the verdict with it."""
        return {**asdict(self), "verdict": self.verdict.value, "parts": [asdict(part) for part in self.parts]}


def verdict_of(parts: Sequence[Part]) -> Verdict:
    """Joins the parts of a claim: one that fails refutes it, and one that couldn't be measured leaves it open.

    Raises:
        ValueError: There are no parts.
    """
    if not parts:
        raise ValueError("a claim needs at least one part; say what is to hold")
    if any(part.holds is False for part in parts):
        return Verdict.NOT_SHOWN
    return Verdict.SHOWN if all(part.holds for part in parts) else Verdict.IMPOSSIBLE


def all_of(outcomes: Sequence[bool]) -> bool | None:
    """Returns whether all hold; None where there are none to judge by."""
    return all(outcomes) if outcomes else None
