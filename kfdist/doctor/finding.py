"""What a check says: how it stands, what was seen, and how to mend it."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How something stands, from best to worst."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: What was looked at, in a word or two.
        verdict: How it stands.
        seen: What was seen.
        mend: What to do; empty where nothing is wrong.
    """

    check: str
    verdict: Verdict
    seen: str
    mend: str = ""

    def to_json(self) -> dict[str, str]:
        """Returns it as JSON values."""
        return asdict(self)


def ok(check: str, seen: str) -> Finding:
    """Says that nothing is wrong."""
    return Finding(check, Verdict.OK, seen)


def warning(check: str, seen: str, mend: str) -> Finding:
    """Says that a run would start, and may come to harm."""
    return Finding(check, Verdict.WARNING, seen, mend)


def failed(check: str, seen: str, mend: str) -> Finding:
    """Says that a run would fail."""
    return Finding(check, Verdict.FAILED, seen, mend)


def worst(findings: Iterable[Finding]) -> Verdict:
    """Returns the worst verdict; OK without any findings."""
    order = list(Verdict)
    return max((finding.verdict for finding in findings), key=order.index, default=Verdict.OK)


def divided(fault: str | Exception) -> tuple[str, str]:
    """Divides the sentence of a fault into what is wrong and what to do."""
    seen, _, mend = str(fault).partition("; ")
    return seen, mend
