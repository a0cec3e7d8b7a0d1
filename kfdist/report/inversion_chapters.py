"""The chapters about inverses: how old and how good they are, what they take, and what they are made of."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from kfdist.report import block_figures, figures, words
from kfdist.report.figures import Curve
from kfdist.report.parts import NO_HISTORY, NO_METHOD, Chapter, Plot, Table, inverts, later_starts, ranges
from kfdist.report.recorded import Line, Recorded

_SHOWN_CHECKPOINTS = 4

_SHOWN_SPECTRA = 4

_SCALES = (
    "EKFAC's scales are mean squares of the gradients along the eigenvectors of both factors, as the ranks measured "
    "them: the eigenvalues of the block itself.",
)


def staleness(run: Recorded) -> Chapter:
    """Returns the chapter on how old inverses are."""
    title = "Staleness of the inverses"
    if not inverts(run):
        return Chapter(title=title, sentences=[NO_METHOD])
    names = list(run.methods)
    windows = [line for line in run.windows if len(line["staleness"]) == len(names)]
    if not windows or not names:
        return Chapter(title=title, sentences=[NO_HISTORY])
    spans = _spans(windows)
    rows = [[line["staleness"][place] for line in windows] for place in range(len(names))]
    if not any(value is not None for row in rows for value in row):
        return Chapter(title=title, sentences=["No inverse was taken into use yet."])
    steps = [max((value for value in line["staleness"] if value is not None), default=math.nan) for line in windows]
    worst = max((value, line["step"]) for value, line in zip(steps, windows, strict=True) if math.isfinite(value))
    table_rows, periods = [], dict(zip(names, windows[-1].get("periods", ()), strict=False))  # none in older histories
    for name, row in zip(names, rows, strict=True):
        known = sorted(value for value in row if value is not None)
        shown = (known[len(known) // 2], known[-1], row[-1]) if known else (None, None, None)
        table_rows.append([name, run.methods[name], *map(words.number, (periods.get(name), *shown))])
    heatmap = Plot(
        svg=block_figures.heatmap(names, spans, rows),
        told=(
            f"Staleness of {words.counted(len(names), 'block')} over the steps; the largest is {worst[0]}, "
            f"up to step {worst[1]:,}."
        ),
    )
    return Chapter(
        title=title,
        sentences=[
            "Staleness is the number of steps between the statistics in a block's inverse and the step that uses it. "
            "Each cell has the largest of its steps; a block has no cell before its first inverse. "
            "At best an inverse gets as old as the steps between two of them, and a delay."
        ],
        plots=[heatmap],
        tables=[
            Table(
                caption="Staleness by block: the largest of each window of steps",
                heads=("block", "method", "steps between inverses", "median", "largest", "last"),
                rows=table_rows,
                folded=True,
            )
        ],
    )


def _spans(windows: Sequence[Line]) -> list[tuple[int, int]]:
    ends = [line["step"] for line in windows]
    begins = [1, *(end + 1 for end in ends[:-1])]
    return [(min(begin, end), end) for begin, end in zip(begins, ends, strict=True)]


def spectra(run: Recorded) -> Chapter:
    """Returns the chapter on the factors' eigenvalues."""
    title = "Spectrum of the factors at checkpoints"
    if not inverts(run):
        return Chapter(title=title, sentences=[NO_METHOD])
    if not run.spectra:
        wrote = any(line["event"] == "checkpoint" and not line.get("fault") for line in run.told)
        methods = words.listed(sorted(set(run.methods.values())))
        why = (
            f"the inverses in use ({methods}) hold no eigenvalues, or there was none yet"
            if wrote
            else "no checkpoint was written yet"
        )
        return Chapter(title=title, sentences=[f"There is no spectrum: {why}."])
    chosen = _spread(run.spectra, _SHOWN_CHECKPOINTS)
    blocks = [block for block in run.methods if block in chosen[-1]["factors"]] or list(chosen[-1]["factors"])
    shown = _spread(blocks, _SHOWN_SPECTRA)
    drawn = {
        block: {
            factor: {
                line["step"]: line["factors"][block][factor]["points"]
                for line in chosen
                if factor in line["factors"].get(block, {})
            }
            for factor in chosen[-1]["factors"][block]
        }
        for block in shown
    }
    rows = []
    for block in blocks:
        for factor, found in chosen[-1]["factors"][block].items():
            points = [point for point in found["points"] if point[1] is not None]
            if points:
                rows.append(
                    [
                        f"{block}: {factor}",
                        words.number(found["size"]),
                        words.number(points[-1][0]),
                        words.number(points[0][1]),
                        words.number(points[-1][1]),
                    ]
                )
    steps = words.listed([f"{line['step']:,}" for line in chosen])
    few = f" Shown are {len(shown)} of {len(blocks)} blocks; the table has all." if len(shown) < len(blocks) else ""
    return Chapter(
        title=title,
        sentences=[
            f"Eigenvalues that the inverse in use had at the checkpoints of the steps {steps}, from the largest on; "
            f"those that a method neither keeps nor has at hand (large dense inverses) are not drawn.{few}",
            *(_SCALES if any("scales" in found for found in chosen[-1]["factors"].values()) else ()),
        ],
        plots=[
            Plot(
                svg=block_figures.spectra(drawn),
                told=(
                    f"Eigenvalues of the factors of {words.listed(shown)} by their place, one curve for each of the "
                    f"steps {steps}."
                ),
            )
        ],
        tables=[
            Table(
                caption=f"Eigenvalues at step {chosen[-1]['step']:,}",
                heads=("factor", "dimension", "kept", "largest", "smallest kept"),
                rows=rows,
                folded=True,
            )
        ],
    )


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """Returns at most so many items from all over a sequence, the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


_WORST: Mapping[str, tuple[str, Callable[[Iterable[float]], float]]] = {
    "residual": ("largest residual", max),
    "rank": ("smallest rank kept", min),
    "smallest_eigenvalue": ("smallest eigenvalue", min),
}

_ERRORS: Mapping[str, str] = {
    "direction_error": "direction error at most",
    "mean_direction_error": "mean outside of what is kept",
}


def diagnostics(run: Recorded) -> Chapter:
    """Returns the chapter on how good inverses are, and on what didn't go as configured."""
    title = "Diagnostics of the inversions"
    if not inverts(run):
        return Chapter(title=title, sentences=[NO_METHOD])
    if not run.windows:
        return Chapter(title=title, sentences=[NO_HISTORY])
    windows = [line for line in run.windows if line["diagnostics"]]
    if not windows:
        none = "The inverses in use have no diagnostics, or there was none yet."
        return Chapter(title=title, sentences=[_mishaps(run), none], tables=_mishap_table(run))
    plots = [plot for quantity in _WORST if (plot := _over_steps(run, windows, quantity)) is not None]
    last = windows[-1]
    rows = [_block_row(run, block, found) for block, found in last["diagnostics"].items()]
    heads = ("block", "method", "ranks kept", "largest residual", "smallest eigenvalue", "retries", *_ERRORS.values())
    table = Table(caption=f"The inverses in use at step {last['step']:,}", heads=heads, rows=rows, folded=True)
    sentences = [_mishaps(run), *_limited_by_rank(last)]
    return Chapter(title=title, sentences=sentences, plots=plots, tables=[*_mishap_table(run), table])


def _limited_by_rank(window: Line) -> list[str]:
    """Says where `rank` keeps directions from being as near to exact ones as was asked for."""
    asked = {block: found for block, found in window["diagnostics"].items() if "limited_by_rank" in found}
    limited = [found for found in asked.values() if found["limited_by_rank"]]
    if not limited:
        return []
    worst, mean = (max(found.get(name) or 0.0 for found in limited) for name in _ERRORS)
    return [
        f"Of {words.counted(len(asked), 'block')}, {len(limited)} would need more eigenpairs than `rank` allows for "
        f"the direction_error asked for: components of their directions may be off by up to {words.number(worst)} of "
        f"themselves, those outside of what is kept by up to {words.number(mean)} on average."
    ]


def _over_steps(run: Recorded, windows: Sequence[Line], quantity: str) -> Plot | None:
    """Draws a quantity's worst and median factor; None where no method gives it."""
    label, pick = _WORST[quantity]
    steps, worst, middle = [], [], []
    for lines in ranges(windows):
        values = sorted(
            value for line in lines for found in line["diagnostics"].values() for value in _of_quantity(found, quantity)
        )
        if values:
            steps.append(lines[-1]["step"])
            worst.append(pick(values))
            middle.append(values[len(values) // 2])
    if not steps:
        return None
    curves = [
        Curve(name="of all factors", x=steps, y=worst, colour=1),
        Curve(name="of the median factor", x=steps, y=middle, colour=0),
    ]
    log = False if quantity == "rank" else None
    return Plot(
        svg=figures.lines(curves, x="step", y=label, starts=later_starts(run), log=log),
        told=(
            f"{label.capitalize()} over the steps; at the end {words.number(worst[-1])}, "
            f"of the median factor {words.number(middle[-1])}."
        ),
    )


def _block_row(run: Recorded, block: str, found: Mapping[str, float | None]) -> list[str]:
    ranks = "/".join(words.number(value) for value in _of_quantity(found, "rank")) or "–"
    residuals, eigenvalues = (_of_quantity(found, quantity) for quantity in ("residual", "smallest_eigenvalue"))
    worst = (max(residuals, default=None), min(eigenvalues, default=None), found.get("rung"))
    errors = (found.get(name) for name in _ERRORS)
    return [block, run.methods.get(block, ""), ranks, *map(words.number, (*worst, *errors))]


def _of_quantity(diagnostics: Mapping[str, float | None], quantity: str) -> list[float]:
    return [
        value
        for name, value in diagnostics.items()
        if value is not None and (name == quantity or name.rpartition("_")[0] == quantity)
    ]


def _mishap_counts(run: Recorded) -> Counter[tuple[str, str]]:
    counts: Counter[tuple[str, str]] = Counter()
    for totals in run.by_start():
        for key, kind in (
            ("failures", "failed inversions"),
            ("fallbacks", "fallbacks"),
            ("degraded", "retried inversions"),
            ("resubmissions", "jobs sent again"),
        ):
            for reason, count in totals[key].items():
                counts[kind, reason] += count
        for key, kind in (
            ("nonfinite_drops", "batches dropped as non-finite"),
            ("courier_restarts", "restarts of couriers"),
            ("samples_lost", "lost samples"),
        ):
            counts[kind, ""] += totals[key]
    return +counts


def _mishaps(run: Recorded) -> str:
    kinds: Counter[str] = Counter()
    for (kind, _), count in _mishap_counts(run).items():
        kinds[kind] += count
    if not kinds:
        return "No inversion failed or was retried, no fallback was used, and no batch was dropped as non-finite."
    return f"Counted were {words.listed([f'{kind} ({count:,})' for kind, count in kinds.items()])}."


def _mishap_table(run: Recorded) -> list[Table]:
    rows = [[kind, reason or "–", words.number(count)] for (kind, reason), count in _mishap_counts(run).most_common(60)]
    return (
        [Table(caption="What didn't go as configured", heads=("what", "reason", "how often"), rows=rows)]
        if rows
        else []
    )
