"""The settings of a method that users may change while a run trains: their names, and how changes are said and sent.

The names are those of the configuration's `preconditioner` and `preconditioner.staleness`, which documents them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import get_args

from kfdist.policies.staleness import AtHardBound
from kfdist.types import Value

NAMES = (
    "damping",
    "kl_clip",
    "factor_period",
    "inverse_period",
    "adoption",
    "lag",
    "soft_bound",
    "hard_bound",
    "at_hard_bound",
)
"""Every setting that can be changed; also the fields of the messages that carry them."""

STALENESS = ("soft_bound", "hard_bound", "at_hard_bound")
"""Those of them that stand in `preconditioner.staleness`."""

PERIODS = ("factor_period", "inverse_period")
"""Those that hold from the step after the agreed one on, whose measurements were begun before."""

NONE = ("kl_clip", "soft_bound", "hard_bound")
"""Those whose 0 says that there is none."""

WORDS: Mapping[str, tuple[str, ...]] = {"adoption": ("asap", "fixed-lag"), "at_hard_bound": get_args(AtHardBound)}
"""What those that are words may be."""

WHOLE = ("factor_period", "inverse_period", "lag", "soft_bound", "hard_bound")
"""Those that are whole numbers."""

AS_CONFIGURED = "configured"
"""The word for a value that is to be as the configuration has it."""

_UNSAID, _CODE_AS_CONFIGURED = math.nan, -1.0


def changed(before: Mapping[str, Value], changes: Mapping[str, Value | None]) -> dict[str, Value]:
    """Returns what differs from the configuration after some changes.

    Args:
        before: What differed.
        changes: New values; None: as configured again.
    """
    after = {**before, **changes}
    return {name: value for name in NAMES if (value := after.get(name)) is not None}


def encode(changes: Mapping[str, Value | None]) -> list[float]:
    """Lays changes out as one float64 a name, for ranks to share."""
    return [_code(name, changes[name]) if name in changes else _UNSAID for name in NAMES]


def decode(codes: Sequence[float]) -> dict[str, Value | None]:
    """Reads back what `encode` laid out."""
    said = {name: code for name, code in zip(NAMES, codes, strict=True) if not math.isnan(code)}
    return {name: None if code == _CODE_AS_CONFIGURED else _value(name, code) for name, code in said.items()}


def shown(name: str, value: Value) -> str:
    """Returns a value as users write it."""
    if name in NONE and value == 0:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def kept(run: str, changes: Mapping[str, Value]) -> str:
    """Says what users had changed before a run was resumed, and how to go back to the configuration."""
    values = ", ".join(f"{name} {shown(name, value)}" for name, value in changes.items())
    back = " ".join(f"{name}={AS_CONFIGURED}" for name in changes)
    return f"{values}, as set in an earlier start, whatever the configuration says; `kfdist set {run} {back}` goes back"


def _code(name: str, value: Value | None) -> float:
    if value is None:
        return _CODE_AS_CONFIGURED
    return float(WORDS[name].index(value)) if isinstance(value, str) else float(value)


def _value(name: str, code: float) -> Value:
    if name in WORDS:
        return WORDS[name][int(code)]
    return int(code) if name in WHOLE else code
