"""Figures of measurements, in the report's style, each a file of its own."""

import re
from collections.abc import Mapping, Sequence
from importlib import resources

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from kfdist.report.drawing import SERIES, plain_powers


def standalone(svg: str) -> str:
    """Makes a figure that takes its colours from the report's page a file of its own, light and dark."""
    page = resources.files("kfdist.report").joinpath("page.html").read_text(encoding="utf-8")
    colours = page[page.index(":root") : page.index("* { box-sizing")].replace(":root", "svg")
    style = f"<style>\n{colours}svg {{ background: var(--paper); font-family: sans-serif; }}\n</style>"
    return re.sub(r"<svg\b([^>]*)>", lambda found: f'<svg width="640"{found[1]}>\n{style}', svg, count=1)


def draw_step_times(axes: Axes, percentiles: Mapping[str, Sequence[float]]) -> None:
    """Draws which share of the steps takes how long, a curve a name.

    Args:
        axes: Where.
        percentiles: By name, those from 0 to 100, in milliseconds (`kfdist.bench.timings.percentiles`).
    """
    for number, (name, milliseconds) in enumerate(percentiles.items()):
        axes.plot(milliseconds, range(101), color=SERIES[number], label=name)
    axes.set_xscale("log")
    plain_powers(axes.xaxis)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5), numticks=8))
    axes.set_xlabel("ms that a step takes at most")
    axes.set_ylabel("% of the steps")
    axes.legend(loc="lower right")
