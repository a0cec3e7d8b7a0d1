"""Figures that have a row for each block: how old inverses are, and the eigenvalues of factors."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

from kfdist.report.block_names import short_names
from kfdist.report.drawing import FAINT, INK, SERIES, drawing, plain_counts, plain_powers

_COLUMNS = 160
_ROW_INCHES = 0.17
_MOST_INCHES = 9.0
_LEAST_SHARE = 1e-9
"""Of the largest eigenvalue: below it there is nothing but rounding, which would squeeze all the rest."""


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
        axes.set_yticks(range(0, len(names), every), short_names(names)[::every], fontsize=7)
        axes.grid(visible=False)
        plain_counts(axes.xaxis)
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
        for row, (name, found) in enumerate(zip(short_names(list(blocks)), blocks.values(), strict=True)):
            for column, factor in enumerate(factors):
                axes = drawn.axes[row * len(factors) + column]
                for step, points in found.get(factor, {}).items():
                    positive = [(index, value) for index, value in points if value > 0]
                    axes.plot(
                        [index for index, _ in positive],
                        [value for _, value in positive],
                        color=SERIES[steps.index(step) % len(SERIES)],
                        label=f"step {step:,}" if row == column == 0 else None,
                        marker="." if len(positive) < 4 else None,
                    )
                axes.set_xscale("log")
                axes.set_yscale("log")
                highest = max((value for points in found.get(factor, {}).values() for _, value in points), default=1.0)
                axes.set_ylim(bottom=max(axes.get_ylim()[0], _LEAST_SHARE * highest))
                axes.set_title(f"{name}: {factor}", color=INK)
                plain_powers(axes.xaxis)
                plain_powers(axes.yaxis)
        inches = drawn.figure.get_figheight()
        drawn.figure.subplots_adjust(
            left=0.14, right=0.98, bottom=0.4 / inches, top=1 - 0.5 / inches, hspace=0.55, wspace=0.42
        )
        drawn.figure.supxlabel("place of the eigenvalue", y=0.02 / inches, fontsize=8.5, color=INK)
        drawn.figure.legend(loc="upper center", ncols=4)  # its room is known already
    return drawn.svg
