"""The kinds of figures that a report has; each returns SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from kfdist.report.drawing import FAINT, SERIES, drawing, plain_counts, plain_powers

MOST_POINTS = 300
_LOG_RANGE = 30.0


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line of a figure.

    Attributes:
        name: For the legend.
        x: Rising.
        y: As many; NaN where there is none.
        colour: Number of its colour.
        marked: Whether each point is marked, for few of them.
        dashed: Whether the line is dashed.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    marked: bool = False
    dashed: bool = False


def lines(
    curves: Sequence[Curve],
    *,
    x: str,
    y: str,
    starts: Sequence[float] = (),
    log: bool | None = None,
    percent: bool = False,
) -> str:
    """Draws curves over steps or seconds.

    Args:
        curves: What is drawn.
        x: What is to the right.
        y: What is upwards.
        starts: Where a resumed run's later starts are.
        log: Whether upwards is logarithmic; if None, where the values span a factor of 30.
        percent: Whether values are shares.
    """
    curves = [_thinned(curve) for curve in curves]
    values = [value for curve in curves for value in curve.y if math.isfinite(value)]
    if log is None:
        log = bool(values) and min(values) > 0 and max(values) > _LOG_RANGE * min(values)
    with drawing(2.7) as drawn:
        axes = drawn.axes[0]
        for curve in curves:
            lonely = curve.marked or len(curve.x) == 1
            axes.plot(
                curve.x,
                curve.y,
                label=curve.name,
                color=SERIES[curve.colour % len(SERIES)],
                marker="o" if lonely else None,
                markersize=3.5,
                linestyle="--" if curve.dashed else "-",
            )
        for start in starts:
            axes.axvline(start, color=FAINT, linewidth=0.9, linestyle=":")
        if log:
            axes.set_yscale("log")
            plain_powers(axes.yaxis)
        if percent:
            axes.yaxis.set_major_formatter(FuncFormatter(_in_percent))
        plain_counts(axes.xaxis)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if len(curves) > 1:
            drawn.legend([curve.name for curve in curves])
    return drawn.svg


def _in_percent(value: float, _: object) -> str:
    return f"{100 * value:g} %"


def _thinned(curve: Curve) -> Curve:
    """Takes means over ranges of x where a curve has more points than can be seen."""
    if len(curve.x) <= MOST_POINTS:
        return curve
    x, y = np.asarray(curve.x, dtype=float), np.asarray(curve.y, dtype=float)
    ranges = ((x - x[0]) / max(x[-1] - x[0], 1e-9) * MOST_POINTS).astype(int)
    parts = np.split(np.arange(len(x)), np.flatnonzero(np.diff(ranges)) + 1)
    means = [float(np.nanmean(y[part])) if np.isfinite(y[part]).any() else math.nan for part in parts]
    return replace(curve, x=[float(x[part].mean()) for part in parts], y=means)


def areas(x: Sequence[float], parts: Mapping[str, Sequence[float]], *, y: str) -> str:
    """Draws parts of a whole over steps, one on the other; rare peaks are cut off, which would hide all the rest."""
    with drawing(3.2) as drawn:
        axes = drawn.axes[0]
        colours = [SERIES[number % len(SERIES)] for number in range(len(parts))]
        xs = list(x) if len(x) > 1 else [0.0, *x]
        ys = [list(values) if len(x) > 1 else [*values, *values] for values in parts.values()]
        axes.stackplot(xs, ys, labels=list(parts), colors=colours, alpha=0.85, linewidth=0)
        axes.set_xlabel("step")
        axes.set_ylabel(y)
        axes.set_xlim(xs[0], xs[-1])
        usual = float(np.quantile(np.sum(ys, axis=0), 0.9))
        axes.set_ylim(0, min(1.05 * float(np.max(np.sum(ys, axis=0))), 2.5 * usual) or 1.0)
        plain_counts(axes.xaxis)
        drawn.legend(list(parts))
    return drawn.svg


def bars(values: Mapping[str, float], *, x: str) -> str:
    """Draws one bar for each name, the first on top."""
    with drawing(0.7 + 0.24 * len(values)) as drawn:
        axes = drawn.axes[0]
        axes.barh(list(values), list(values.values()), color=SERIES[0], height=0.65)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(x)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    return drawn.svg


def shares(curves: Mapping[str, Sequence[tuple[float, float]]], *, x: str) -> str:
    """Draws which share of all takes at most so long, for each name."""
    with drawing(2.7) as drawn:
        axes = drawn.axes[0]
        for number, (name, points) in enumerate(curves.items()):
            colour = SERIES[number % len(SERIES)]
            seconds = [points[0][0] * 0.9, *(second for second, _ in points)]
            axes.step(seconds, [0.0, *(share for _, share in points)], where="post", label=name, color=colour)
        axes.set_xscale("log")
        plain_powers(axes.xaxis)
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(FuncFormatter(_in_percent))
        axes.set_xlabel(x)
        axes.set_ylabel("share that takes at most so long")
        drawn.legend(list(curves))
    return drawn.svg
