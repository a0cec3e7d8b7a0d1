"""The chapters about what a run takes: step time by phase, inversions by method, bytes by purpose."""

from collections import Counter

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
)
from kfdist.report.recorded import Line, Recorded
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
    steps = [line["step"] for line in run.windows]
    wholes = [Durations.from_json(line["phases"]["total"]) for line in run.windows]
    quantiles = [
        Curve(name=name, x=steps, y=[whole.quantile(q) for whole in wholes], colour=colour)
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
                svg=figures.areas(steps, _parts(run.windows, wholes, order), y="ms a step (mean)"),
                told=(
                    f"Mean time of a step by phase; a step took {words.seconds(total.mean)} on average. Rare peaks are "
                    "cut off."
                ),
            ),
            Plot(
                svg=figures.lines(quantiles, x="step", y="seconds of a step", starts=later_starts(run)),
                told=f"Median and 99th percentile of a step's seconds; over the run {median} and {slow}.",
            ),
        ],
        tables=[Table(caption="Seconds of a step by phase", heads=heads, rows=rows)],
    )


def _parts(windows: list[Line], wholes: list[Durations], order: list[str]) -> dict[str, list[float]]:
    """Returns the mean milliseconds that a step of each window spent: in no phase, in the largest ones, in others."""
    spent = {
        phase: [
            1e3 * line["phases"].get(phase, {"total": 0.0})["total"] / whole.count
            for line, whole in zip(windows, wholes, strict=True)
        ]
        for phase in order
    }
    rest = [max(0.0, 1e3 * whole.mean - sum(parts)) for whole, *parts in zip(wholes, *spent.values(), strict=True)]
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
    return Chapter(
        title=title,
        plots=[
            Plot(
                svg=figures.bars({purpose: count / 1e6 for purpose, count in known}, x="MB, over all ranks"),
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
