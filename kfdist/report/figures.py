"""The kinds of figures that a report has; each returns SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from kfdist.report.drawing import FAINT, INK, SERIES, drawing, plain_powers

MOST_POINTS = 600
_COLUMNS = 160
_ROW_INCHES = 0.17
_MOST_INCHES = 9.0
_LABEL_CHARACTERS = 18
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
    top: float | None = None,
    log: bool | None = None,
    percent: bool = False,
) -> str:
    """Draws curves over steps or seconds.

    Args:
        curves: What is drawn.
        x: What is to the right.
        y: What is upwards.
        starts: Where a resumed run's later starts are.
        top: The upper end, if it is known.
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
        elif top is not None:
            axes.set_ylim(top=top)
        if percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if len(curves) > 1:
            axes.legend(ncols=2 if len(curves) > 3 else 1)
    return drawn.svg


def _thinned(curve: Curve) -> Curve:
    """Takes means of neighbours where a curve has more points than can be seen."""
    if len(curve.x) <= MOST_POINTS:
        return curve
    parts = np.array_split(np.arange(len(curve.x)), MOST_POINTS)
    x, y = np.asarray(curve.x, dtype=float), np.asarray(curve.y, dtype=float)
    means = [float(np.nanmean(y[part])) if np.isfinite(y[part]).any() else math.nan for part in parts]
    return Curve(
        name=curve.name,
        x=[float(x[part].mean()) for part in parts],
        y=means,
        colour=curve.colour,
        marked=curve.marked,
        dashed=curve.dashed,
    )


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
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        drawn.figure.legend(loc="outside lower center", ncols=3)
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
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axes.set_xlabel(x)
        axes.set_ylabel("share that takes at most so long")
        axes.legend(loc="lower right")
    return drawn.svg


def heatmap(names: Sequence[str], windows: Sequence[tuple[int, int]], rows: Sequence[Sequence[float | None]]) -> str:
    """Draws a value of each block over steps, the larger the brighter.

    Args:
        names: The blocks.
        windows: The first and the last step of each column of `rows`, rising.
        rows: By block and window; None where there is nothing.
    """
    first, last = windows[0][0], windows[-1][1]
    columns = min(_COLUMNS, last - first + 1)
    cells = np.full((len(names), columns), np.nan)
    for number, (begin, end) in enumerate(windows):
        left = (begin - first) * columns // (last - first + 1)
        right = max(left + 1, (end - first + 1) * columns // (last - first + 1))
        values = np.array([[math.nan if row[number] is None else row[number]] for row in rows], dtype=float)
        cells[:, left:right] = np.fmax(cells[:, left:right], values)
    with drawing(min(1.1 + _ROW_INCHES * len(names), _MOST_INCHES)) as drawn:
        axes = drawn.axes[0]
        image = axes.imshow(
            np.ma.masked_invalid(cells),
            aspect="auto",
            cmap="viridis",
            interpolation="nearest",
            extent=(first - 0.5, last + 0.5, len(names) - 0.5, -0.5),
            vmin=0,
        )
        every = max(1, math.ceil(len(names) * 0.115 / (_MOST_INCHES - 1.1)))
        axes.set_yticks(range(0, len(names), every), [_short(name) for name in names[::every]], fontsize=7)
        axes.grid(visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("step")
        bar = drawn.figure.colorbar(image, ax=axes, location="top", shrink=0.7, aspect=30, pad=0.02)
        bar.set_label("staleness in steps")
        if bar.solids is not None:
            bar.solids.set_rasterized(True)
        bar.locator = MaxNLocator(6, integer=True)
        bar.update_ticks()
        bar.outline.set_edgecolor(FAINT)
    return drawn.svg


def spectra(blocks: Mapping[str, Mapping[str, Mapping[int, Sequence[tuple[int, float]]]]]) -> str:
    """Draws the eigenvalues of factors, a row for each block, a column for each factor, a curve for each checkpoint.

    Args:
        blocks: By block, factor and step: (index from 1, eigenvalue).
    """
    factors = sorted({factor for found in blocks.values() for factor in found})
    steps = sorted({step for found in blocks.values() for curves in found.values() for step in curves})
    with drawing(0.6 + 1.45 * len(blocks), rows=len(blocks), columns=len(factors)) as drawn:
        for row, (block, found) in enumerate(blocks.items()):
            for column, factor in enumerate(factors):
                axes = drawn.axes[row * len(factors) + column]
                for step, points in found.get(factor, {}).items():
                    positive = [(index, value) for index, value in points if value > 0]
                    axes.plot(
                        [index for index, _ in positive],
                        [value for _, value in positive],
                        color=SERIES[steps.index(step) % len(SERIES)],
                        label=f"step {step}" if row == column == 0 else None,
                        marker="." if len(positive) < 4 else None,
                    )
                axes.set_xscale("log")
                axes.set_yscale("log")
                axes.set_title(f"{_short(block)}: {factor}", color=INK)
                plain_powers(axes.xaxis)
                plain_powers(axes.yaxis)
        inches = drawn.figure.get_figheight()
        drawn.figure.subplots_adjust(
            left=0.14, right=0.98, bottom=0.4 / inches, top=1 - 0.5 / inches, hspace=0.55, wspace=0.42
        )
        drawn.figure.supxlabel("place of the eigenvalue", y=0.02 / inches, fontsize=8.5, color=INK)
        drawn.figure.legend(loc="upper center", ncols=4)
    return drawn.svg


def _short(name: str) -> str:
    """Cuts the middle out of a long name: the beginning and the end tell blocks apart."""
    if len(name) <= _LABEL_CHARACTERS:
        return name
    kept = _LABEL_CHARACTERS - 1
    return f"{name[: kept // 3]}…{name[-(kept - kept // 3) :]}"
