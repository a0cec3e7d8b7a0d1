"""The table of blocks, the stalest first, drawn so that no number is cut: what doesn't fit is left out whole."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from kfdist.telemetry.metrics import METRICS
from kfdist.types import MetricSample

STALENESS = "kfdist_staleness_steps"
PERIOD = "kfdist_update_period_steps"
METHOD = "kfdist_block_method_info"
NAME_LEAST = 12
"""Columns that a block's name has at least, before other columns go."""

_LONGEST_BAR = 24
_SHORT_BAR = 10
_SHORTEST_BAR = 6


@dataclass(frozen=True, kw_only=True)
class Block:
    """What was measured of one block: by metric, the worst of its factors."""

    name: str
    method: str
    values: Mapping[str, float]

    @property
    def staleness(self) -> float | None:
        """Training steps since the statistics in its inverse."""
        return self.values.get(STALENESS)

    @property
    def periods_old(self) -> float | None:
        """The same in its own steps between two inverses; in training steps, where a run doesn't tell these."""
        return None if self.staleness is None else self.staleness / (self.values.get(PERIOD) or 1.0)


@dataclass(frozen=True, kw_only=True)
class NumberColumn:
    """A column of numbers.

    Attributes:
        metric: What it shows.
        head: What stands above it.
        form: How a value is written.
    """

    metric: str
    head: str
    form: Callable[[float], str]


def steps(value: float) -> str:
    """Writes a count."""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e7 else f"{value:.3g}"


def scientific(value: float) -> str:
    """Writes a small number with two digits."""
    return "0" if value == 0 else f"{value:.1e}"


def age(seconds: float) -> str:
    """Writes seconds in the unit that suits them."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


_STALE = NumberColumn(metric=STALENESS, head="STALE", form=steps)
_RANK = NumberColumn(metric="kfdist_inversion_rank", head="RANK", form=steps)
_DIRECTION = NumberColumn(metric="kfdist_inversion_direction_error", head="DIR ERR", form=scientific)
_RESIDUAL = NumberColumn(metric="kfdist_inversion_residual", head="RESIDUAL", form=scientific)
_RETRIES = NumberColumn(metric="kfdist_inversion_rung", head="RETRIES", form=steps)
_AGE = NumberColumn(metric="kfdist_staleness_seconds", head="AGE", form=age)
_APPROXIMATION = NumberColumn(metric="kfdist_inversion_approximation_error", head="APPROX", form=scientific)
_ORTHOGONALITY = NumberColumn(metric="kfdist_inversion_orthogonality_error", head="ORTHOG", form=scientific)
_EIGENVALUE = NumberColumn(metric="kfdist_inversion_smallest_eigenvalue", head="MIN EIG", form=scientific)

COLUMNS = (_STALE, _RANK, _RESIDUAL, _RETRIES, _AGE, _DIRECTION, _APPROXIMATION, _ORTHOGONALITY, _EIGENVALUE)
"""All columns, the most wanted first."""


def rank_note(samples: Sequence[MetricSample]) -> str:
    """Says of how many blocks `rank` leaves out eigenpairs that the error asked for would need; empty if of none."""
    limits = {
        sample.labels.get("block"): sample.value
        for sample in samples
        if sample.name == "kfdist_inversion_limited_by_rank"
    }
    limited = [name for name, value in limits.items() if value]
    errors = [
        sample.value
        for sample in samples
        if sample.name == "kfdist_inversion_direction_error" and sample.labels.get("block") in limited
    ]
    if not errors:
        return ""
    return (
        f"rank limits {len(limited)} of {len(limits)} blocks: components of their directions may be off by up to "
        f"{max(errors):.2g} of themselves, more than the direction_error asked for; coverage() has the means"
    )


def blocks_of(samples: Sequence[MetricSample]) -> list[Block]:
    """Returns the blocks that samples tell of, the stalest by their periods first; those without an inverse last."""
    shown = {PERIOD, *(column.metric for column in COLUMNS)}
    values: dict[str, dict[str, float]] = {}
    methods: dict[str, str] = {}
    for sample in samples:
        if (name := sample.labels.get("block")) is None:
            continue
        if sample.name == METHOD:
            methods[name] = sample.labels["method"]
        elif sample.name in shown:
            of_block = values.setdefault(name, {})
            known = of_block.get(sample.name, sample.value)
            of_block[sample.name] = METRICS[sample.name].across.worst([known, sample.value])
    blocks = [Block(name=name, method=methods.get(name, ""), values=of_block) for name, of_block in values.items()]
    return sorted(blocks, key=lambda block: -1.0 if block.periods_old is None else block.periods_old, reverse=True)


def shortened(text: str, width: int) -> str:
    """Leaves out the middle of a text that is longer than `width`: names of layers differ at their ends."""
    if len(text) <= width:
        return text
    if width < 5:
        return text[: max(0, width)]
    tail = (width - 1) * 3 // 5
    return f"{text[: width - 1 - tail]}…{text[-tail:]}"


def _without_common_start(names: Sequence[str]) -> list[str]:
    """Leaves out the modules that all names begin with, such as "transformer.encoder.layers."."""
    parts = [name.split(".")[:-1] for name in names]
    common = os.path.commonprefix(parts) if len(names) > 1 else []
    start = len(".".join(common)) + 1 if common else 0
    return [f"…{name[start:]}" if start > 1 else name for name in names]


def block_table(
    blocks: Sequence[Block], width: int, *, full_bar: float, bars: bool = True, plain: bool = False
) -> Table:
    """Draws blocks in the order given.

    Args:
        blocks: What to draw.
        width: Characters of a line. Columns that don't fit are left out, those at the end of `COLUMNS` first.
        full_bar: How many periods of a block a full bar is; steps, where a run doesn't tell the blocks' periods.
        bars: Whether there are any.
        plain: Whether bars are made of ASCII.
    """
    columns = [column for column in COLUMNS if any(column.metric in block.values for block in blocks)]
    written = {
        column.head: [
            column.form(block.values[column.metric]) if column.metric in block.values else "-" for block in blocks
        ]
        for column in columns
    }
    widths = {head: max(map(len, [head, *cells])) for head, cells in written.items()}
    methods = max((len(block.method) for block in blocks), default=0)
    longest = max([len("BLOCK"), *(len(block.name) for block in blocks)])
    named = min(longest, max(NAME_LEAST, width // 3))
    left = width - named
    kept: list[NumberColumn] = []
    for column in columns[:3]:
        if left >= widths[column.head] + 2:
            kept.append(column)
            left -= widths[column.head] + 2
    with_method = bool(methods) and left >= max(methods, 6) + 2
    left -= max(methods, 6) + 2 if with_method else 0
    bar = min(_LONGEST_BAR if longest <= named else _SHORT_BAR, left - 2) if bars and left >= _SHORTEST_BAR + 2 else 0
    left -= bar + 2 if bar else 0
    for column in columns[3:]:
        if left >= widths[column.head] + 2:
            kept.append(column)
            left -= widths[column.head] + 2
    named = min(longest, named + max(0, left))
    names = [block.name for block in blocks]
    if longest > named:
        names = [shortened(name, named) for name in _without_common_start(names)]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", expand=False)
    table.add_column("BLOCK", width=named, no_wrap=True, overflow="crop")
    for column in kept:
        table.add_column(column.head, width=widths[column.head], justify="right", no_wrap=True, overflow="crop")
        if column is _STALE and bar:
            table.add_column("", width=bar, no_wrap=True)
        if column is _STALE and with_method:
            table.add_column("METHOD", width=max(methods, 6), no_wrap=True)
    for number, block in enumerate(blocks):
        row: list[str | Text] = [names[number]]
        for column in kept:
            row.append(written[column.head][number])
            if column is _STALE and bar:
                row.append(staleness_bar(block.periods_old, full_bar, bar, plain=plain))
            if column is _STALE and with_method:
                row.append(block.method)
        table.add_row(*row)
    return table


def staleness_bar(staleness: float | None, full: float, width: int, *, plain: bool = False) -> Text:
    """Draws a bar: green up to half of `full`, then yellow, red at the full."""
    share = min(1.0, (staleness or 0.0) / full) if full > 0 else 0.0
    style = "green" if share <= 0.5 else "yellow" if share < 1 else "red"
    eighths = round(share * width * 8)
    if plain:
        return Text("#" * (eighths // 8), style=style)
    return Text("█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8], style=style)
