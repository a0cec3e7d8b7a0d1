"""Names of blocks, short enough for an axis."""

import re
from collections import Counter
from collections.abc import Sequence

LABEL_CHARACTERS = 20
"""Longest name that is drawn, but where only the whole one tells two blocks apart."""


def short_names(names: Sequence[str]) -> list[str]:
    """Returns the names of blocks, shortened so that they stay apart: "model.decoder.layers.11.fc1" as "m.d.l.11.fc1".

    Args:
        names: Those that are shown together; no two are equal.
    """
    ways = [(_with_initials(name), _without_middle(name)) for name in names]
    taken = [Counter(each) for each in zip(*ways, strict=True)]
    return [
        next((short for short, counts in zip(each, taken, strict=True) if counts[short] == 1), name)
        for name, each in zip(names, ways, strict=True)
    ]


def _with_initials(name: str) -> str:
    """Makes letters of a long name's modules, the first ones first, and leaves out the middle of what is still long."""
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if len(".".join(parts)) > LABEL_CHARACTERS:
            parts[place] = part if part.isdecimal() else _initial(part)
    return _without_middle(".".join(parts))


def _initial(part: str) -> str:
    """Returns a module's first letter with the number that it ends with: "layer3" is one of several."""
    number = re.search(r"\d*$", part[1:])
    return part[:1] + (number[0] if number else "")


def _without_middle(text: str) -> str:
    """Leaves out the middle of a long text: names differ at their ends."""
    if len(text) <= LABEL_CHARACTERS:
        return text
    tail = LABEL_CHARACTERS * 3 // 5
    return f"{text[: LABEL_CHARACTERS - 1 - tail]}…{text[-tail:]}"
