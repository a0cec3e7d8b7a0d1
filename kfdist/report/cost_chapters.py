"""The chapters about what a run takes: step time by phase, inversions by method, bytes by purpose."""

from collections import Counter
from collections.abc import Mapping, Sequence

from kfdist.report import figures, words
from kfdist.report.figures import Curve
from kfdist.report.parts import (
    NO_HISTORY,
    NO_METHOD,
    Chapter,
    Plot,
    Table,
    inverts,
    later_starts,
    merged_durations,
    ranges,
)
from kfdist.report.recorded import Recorded
from kfdist.telemetry.durations import Durations
from kfdist.telemetry.metrics import STEP_PHASES

_SHOWN_PHASES = 6
_PURPOSES = {
    "gradients": "averaging gradients over the ranks",
    "table": "the ranks' table of what is announced and asked",
    "statistics": "summing statistics, calibrations and noise over the ranks",
    "jobs": "statistics that ranks sent to be inverted",
    "results": "inverses that came back",
    "snapshots": "inverses broadcast to all ranks",
    "to_owners": "what couriers sent to owners, each retry again",
    "from_owners": "what owners sent to couriers",
}


def step_time(run: Recorded) -> Chapter:
    """Returns the chapter on step time by phase."""
    title = "Step time by phase"
    if not run.windows:
        mean = (run.summary.get("step_seconds") or {}).get("mean")
        known = [] if mean is None else [f"A step took {words.seconds(mean)} on average."]
        return Chapter(title=title, sentences=[NO_HISTORY, *known])
    merged = merged_durations(run.windows, "phases")
    total = merged["total"]
    order = ["input", *(phase for phase in STEP_PHASES if phase in merged and phase not in ("input", "total"))]
    rows = [
        [phase, *_durations(found), words.share(found.total / total.total), STEP_PHASES.get(phase, "")]
        for phase, found in ((phase, merged[phase]) for phase in ("total", *order))
    ]
    median, slow = words.seconds(total.quantile(0.5)), words.seconds(total.quantile(0.99))
    unit, factor = ("ms", 1e3) if total.quantile(0.5) < 1 else ("seconds", 1.0)
    windows = ranges(run.windows)
    steps = [found[-1]["step"] for found in windows]
    phases = [merged_durations(found, "phases") for found in windows]
    quantiles = [
        Curve(name=name, x=steps, y=[factor * found["total"].quantile(q) for found in phases], colour=colour)
        for q, name, colour in ((0.5, "p50", 0), (0.99, "p99", 1))
    ]
    heads = ("phase", "mean", "p50", "p99", "longest", "share", "what happens")
    return Chapter(
        title=title,
        sentences=[
            f"A step took {median} (p50) and {slow} (p99), as the host of rank 0 saw it. What no phase claims is "
            "forward, backward, the gradients' reduction and the optimizer."
        ],
        plots=[
            Plot(
                svg=figures.areas(steps, _parts(phases, order, factor), y=f"{unit} a step (mean)"),
                told=(
                    f"Mean time of a step by phase; a step took {words.seconds(total.mean)} on average. Rare peaks are "
                    "cut off."
                ),
            ),
            Plot(
                svg=figures.lines(quantiles, x="step", y=f"{unit} a step", starts=later_starts(run)),
                told=f"Median and 99th percentile of a step's seconds; over the run {median} and {slow}.",
            ),
        ],
        tables=[Table(caption="Seconds of a step by phase", heads=heads, rows=rows)],
    )


def _parts(windows: Sequence[Mapping[str, Durations]], order: Sequence[str], factor: float) -> dict[str, list[float]]:
    """Returns what a step of each window spent on average: in no phase, in the largest ones, in others."""
    spent = {
        phase: [factor * found.get(phase, Durations()).total / found["total"].count for found in windows]
        for phase in order
    }
    rest = [
        max(0.0, factor * found["total"].mean - sum(parts))
        for found, *parts in zip(windows, *spent.values(), strict=True)
    ]
    largest = sorted(order, key=lambda phase: -sum(spent[phase]))[:_SHOWN_PHASES]
    others = [spent[phase] for phase in order if phase not in largest]
    return {
        "model and optimizer": rest,
        **{phase: spent[phase] for phase in order if phase in largest},
        **({"others": [sum(values) for values in zip(*others, strict=True)]} if others else {}),
    }


def _durations(found: Durations) -> list[str]:
    return [words.seconds(value) for value in (found.mean, found.quantile(0.5), found.quantile(0.99), found.largest)]


def inversions(run: Recorded) -> Chapter:
    """Returns the chapter on the seconds of inversions by method."""
    title = "Inversion times"
    if not inverts(run):
        return Chapter(title=title, sentences=[NO_METHOD])
    if not run.windows:
        return Chapter(title=title, sentences=[NO_HISTORY])
    merged = dict(sorted(merged_durations(run.windows, "inversions").items()))
    if not merged:
        lacking = "No result of an inversion came in during the recorded steps"
        return Chapter(title=title, sentences=[f'{lacking}; what ranks invert at once is part of the phase "invert".'])
    told = [
        f"{method}, {words.counted(found.count, 'inversion')}: {words.seconds(found.quantile(0.5))} (p50)"
        for method, found in merged.items()
    ]
    rows = [
        [method, words.number(found.count), *_durations(found), words.seconds(found.total)]
        for method, found in merged.items()
    ]
    heads = ("method", "inversions", "mean", "p50", "p99", "longest", "together")
    return Chapter(
        title=title,
        plots=[
            Plot(
                svg=figures.shares({method: found.shares() for method, found in merged.items()}, x="seconds"),
                told=f"How long inversions took. {words.listed(told)}.",
            )
        ],
        tables=[Table(caption="Seconds of an inversion by method", heads=heads, rows=rows)],
    )


def bytes_moved(run: Recorded) -> Chapter:
    """Returns the chapter on bytes by purpose."""
    title = "Bytes by purpose"
    starts = run.by_start()
    if not starts:
        return Chapter(title=title, sentences=[NO_HISTORY])
    moved: Counter[str] = Counter()
    for totals in starts:
        moved.update(totals["bytes"])
    known = [(purpose, count) for purpose, count in moved.most_common() if count]
    if not known:
        return Chapter(title=title, sentences=["One rank that inverts for itself moves no bytes."])
    steps = sum(totals["steps"] for totals in starts)
    rows = [
        [purpose, words.size(count), words.size(count / steps), _PURPOSES.get(purpose, "")] for purpose, count in known
    ]
    told = words.listed([f"{purpose} {words.size(count)}" for purpose, count in known])
    factor, unit = words.size_unit(known[0][1])
    return Chapter(
        title=title,
        plots=[
            Plot(
                svg=figures.bars({purpose: count / factor for purpose, count in known}, x=f"{unit}, over all ranks"),
                told=f"Bytes moved over all ranks by purpose: {told}.",
            )
        ],
        tables=[
            Table(
                caption="Bytes over all ranks and starts",
                heads=("purpose", "bytes", "a step", "what they are"),
                rows=rows,
            )
        ],
    )
