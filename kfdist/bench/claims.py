"""A claim of a paper, what was measured of it, and the verdict that follows."""

from collections.abc import Iterable
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
        conditions: On what it was measured: sizes, settings, data.
        figures: What was measured, as JSON values.
    """

    claim: str
    title: str
    parts: tuple[Part, ...]
    conditions: dict[str, Any]
    figures: dict[str, Any]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError(f"claim {self.claim!r} has no parts; say what is to hold")

    @property
    def verdict(self) -> Verdict:
        """Joins the parts: one that fails refutes the claim, and one that couldn't be measured leaves it open."""
        if any(part.holds is False for part in self.parts):
            return Verdict.NOT_SHOWN
        return Verdict.SHOWN if all(part.holds for part in self.parts) else Verdict.IMPOSSIBLE

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON values, the verdict with it."""
        fields = {**asdict(self), "parts": [asdict(part) for part in self.parts]}
        return {"verdict": self.verdict.value, **fields}


def less_at_every_width(statement: str, pairs: Iterable[tuple[int, float, float]], unit: str) -> Part:
    """Makes the part that something is less than something else at every width; None where none was measured.

    Args:
        statement: What is to hold.
        pairs: Per width d, (d, what is to be less, the other).
        unit: Of both.
    """
    listed = list(pairs)
    seen = (f"d = {d}: {own:.3g} {unit}, not {other:.3g} ({other / own:.1f} times)" for d, own, other in listed)
    holds = all(own < other for _, own, other in listed) if listed else None
    return Part(statement=statement, holds=holds, seen=", ".join(seen) or "not measured")
