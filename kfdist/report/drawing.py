"""Figures as SVG that lies inside a page and takes its colours from the page: the only place that imports matplotlib.

matplotlib knows fixed colours only. What it is given here are names in disguise: each stands for a variable of the
page's style sheet, which has one value for a light page and another for a dark one, and replaces the colour in the SVG.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

INK, FAINT = "#010101", "#010102"
_VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)"}
SERIES = [f"#0102{number:02x}" for number in range(12)]
"""Colours of lines and areas, in order."""
_VARIABLES |= {colour: f"var(--series-{number})" for number, colour in enumerate(SERIES)}

WIDTH = 4.5
"""Inches, at 72 points each: about a phone's width, on which a point is then about a pixel."""

_LEGEND_CHARACTERS = 75
"""Of a line below a figure, with eight for each name's mark."""

_STYLE: Mapping[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kfdist",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.limits": (-3, 5),
    "grid.color": FAINT,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.5,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.3,
    "path.simplify_threshold": 0.3,
}


class Drawing:
    """A figure that is being drawn.

    Args:
        height: Inches.
        rows: How many axes stand above each other.
        columns: How many stand side by side.

    Attributes:
        figure: The whole figure.
        axes: Its axes, row by row.
        svg: As it is drawn; empty until `finish`.
    """

    def __init__(self, height: float, rows: int = 1, columns: int = 1) -> None:
        # Finding out how much room many axes need takes longer than drawing them.
        layout = "constrained" if rows * columns == 1 else None
        self.figure = Figure(figsize=(WIDTH, height), layout=layout)
        grid = self.figure.subplots(rows, columns, squeeze=False)
        self.axes: Sequence[Axes] = [axes for row in grid for axes in row]
        self.svg = ""

    def legend(self, names: Sequence[str]) -> None:
        """Names what is drawn, below it, in as many columns as the names leave room for."""
        longest = max(map(len, names), default=0)
        self.figure.legend(loc="outside lower center", ncols=max(1, min(3, _LEGEND_CHARACTERS // (longest + 8))))

    def finish(self) -> None:
        """Turns it into SVG."""
        written = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        self.figure.savefig(written, format="svg", transparent=True, metadata=nothing)
        self.svg = _inline(written.getvalue())


@contextmanager
def drawing(height: float, rows: int = 1, columns: int = 1) -> Iterator[Drawing]:
    """Opens a drawing in the report's style; its `svg` is there after the context. Arguments as for `Drawing`."""
    with matplotlib.rc_context(dict(_STYLE)):
        drawn = Drawing(height, rows, columns)
        yield drawn
        drawn.finish()


def plain_powers(axis: Axis) -> None:
    """Labels a logarithmic axis with plain numbers: setting powers of ten takes longer than all the rest."""
    axis.set_major_locator(LogLocator(numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def plain_counts(axis: Axis) -> None:
    """Labels an axis with a few whole numbers, large ones as 20k or 3M."""
    large = EngFormatter(sep="")

    def label(value: float, place: int) -> str:
        return large(value, place) if axis.get_view_interval()[1] >= 20_000 else f"{value:,.0f}"

    axis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_major_formatter(FuncFormatter(label))


def _inline(document: str) -> str:
    """Returns the element of an SVG document: colours by name, as wide as the page lets it be."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub("#0[0-9a-f]{5}", lambda found: _VARIABLES.get(found[0], found[0]), svg)
    return svg.strip()


def unique(svg: str, prefix: str) -> str:
    """Puts `prefix` before all identifiers of an SVG, so that several can lie in one page."""
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
