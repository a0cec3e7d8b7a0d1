"""A page that sets several runs side by side."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from kfdist.errors import ConfigError
from kfdist.report import figures, words
from kfdist.report.figures import Curve
from kfdist.report.page import render, status, write_page
from kfdist.report.parts import Chapter, Plot, Table, curve, flat, merged_durations, ranges
from kfdist.report.recorded import Line, Recorded
from kfdist.report.training_chapters import metric_names

MOST_RUNS = 12
"""As many as there are colours."""

_WHERE = ("run.dir", "run.name", "control.")


def write_comparison(directories: Sequence[Path], output: Path | None = None) -> Path:
    """Writes the page that compares runs.

    Args:
        directories: The runs', at least two.
        output: The file; `comparison.html` in the first run's directory if not given.

    Returns:
        The file.

    Raises:
        ConfigError: There are too many, one is given twice, or one isn't a run directory.
        EnvironmentFault: One can't be read, or the file can't be written.
    """
    if len(directories) > MOST_RUNS:
        raise ConfigError(f"{len(directories)} runs are given; compare at most {MOST_RUNS} at once")
    if len({directory.resolve() for directory in directories}) < len(directories):
        raise ConfigError(f"the same run is given twice: {words.listed([str(each) for each in directories])}")
    runs = _by_name([Recorded.of(directory) for directory in directories])
    page = render(
        title=f"Runs {words.listed(list(runs))}",
        sentences=[f"{name} ({run.directory}): {status(run)}" for name, run in runs.items()],
        facts=[],
        chapters=[_loss(runs), _results(runs), _staleness(runs), _configurations(runs)],
        footer=f"Made from {words.listed([str(directory) for directory in directories])}",
    )
    return write_page(output or directories[0] / "comparison.html", page)


def _by_name(runs: Sequence[Recorded]) -> dict[str, Recorded]:
    """Names runs: by their name, by their directory's, or by its path, whichever tells all of them apart."""
    ways: tuple[Callable[[Recorded], str], ...] = (
        lambda run: run.name,
        lambda run: run.directory.resolve().name,
        lambda run: str(run.directory),
    )
    named = ({way(run): run for run in runs} for way in ways)
    return next(found for found in named if len(found) == len(runs))


def _loss(runs: Mapping[str, Recorded]) -> Chapter:
    plots = []
    factor, unit = words.time_unit(max((run.seconds() or [(0, 0.0)])[-1][1] for run in runs.values()))
    for metric in dict.fromkeys(name for run in runs.values() for name in metric_names(run)):
        accuracy = metric.endswith("accuracy")
        for axis, label in ((_steps, "step"), (partial(_trained, factor), f"{unit} trained")):
            for kind, key, lines in (("training", metric, _periods), ("validation", f"test_{metric}", _evaluations)):
                curves = list(_overlaid(runs, key, lines, axis))
                if all(len(each.x) == 1 for each in curves):
                    continue  # the results have them
                svg = figures.lines(
                    curves, x=label, y=f"{metric}, {kind}", percent=accuracy, log=_log(curves, accuracy)
                )
                ends = words.listed([f"{each.name} {words.metric(metric, each.y[-1])}" for each in curves])
                plots.append(Plot(svg=svg, told=f"{metric.capitalize()} in {kind} by {label}; at the end {ends}."))
    lacking = [name for name, run in runs.items() if not run.steps]
    sentences = [f"Without a completed log period: {words.listed(lacking)}."] if lacking else []
    if any(len(run.starts) > 1 for run in runs.values()):
        sentences.append("Pauses between the starts of a resumed run don't count as time trained.")
    return Chapter(title="Loss and accuracy", sentences=sentences, plots=plots)


def _log(curves: Sequence[Curve], accuracy: bool) -> bool | None:
    return False if accuracy or any(not math.isfinite(value) for each in curves for value in each.y) else None


def _periods(run: Recorded) -> list[Line]:
    return run.steps


def _evaluations(run: Recorded) -> list[Line]:
    return run.evaluated("trained")


def _steps(run: Recorded, steps: Sequence[float]) -> list[float]:
    del run
    return list(steps)


def _trained(factor: int, run: Recorded, steps: Sequence[float]) -> list[float]:
    """Returns how long had been trained when steps were done, to the log period, in units of so many seconds."""
    marks = run.seconds()
    found, place = [], 0
    for step in steps:
        while place < len(marks) - 1 and marks[place][0] < step:
            place += 1
        found.append(marks[place][1] / factor)
    return found


def _overlaid(
    runs: Mapping[str, Recorded],
    key: str,
    lines: Callable[[Recorded], list[Line]],
    axis: Callable[[Recorded, Sequence[float]], list[float]],
) -> Iterator[Curve]:
    for colour, (name, run) in enumerate(runs.items()):
        for found in curve(lines(run), key, Curve(name=name, x=(), y=(), colour=colour, marked=key.startswith("test"))):
            yield replace(found, x=axis(run, found.x))


def _staleness(runs: Mapping[str, Recorded]) -> Chapter:
    title = "Staleness of the inverses"
    curves = []
    for colour, (name, run) in enumerate(runs.items()):
        worst = [
            {
                "step": lines[-1]["step"],
                "worst": max(
                    (value for line in lines for value in line["staleness"] if value is not None), default=None
                ),
            }
            for lines in (ranges(run.windows) if run.windows else ())
        ]
        curves += curve(worst, "worst", Curve(name=name, x=(), y=(), colour=colour))
    if not curves:
        return Chapter(title=title, sentences=["None of the runs has an inverse, as far as they tell."])
    lacking = [name for name in runs if name not in {each.name for each in curves}]
    told = words.listed([f"{each.name} {words.number(max(each.y))}" for each in curves])
    return Chapter(
        title=title,
        sentences=[f"Without inverses: {words.listed(lacking)}."] if lacking else [],
        plots=[
            Plot(
                svg=figures.lines(curves, x="step", y="largest staleness in steps", log=False),
                told=f"The largest staleness of any block by step; over the run {told}.",
            )
        ],
    )


def _results(runs: Mapping[str, Recorded]) -> Chapter:
    found = {name: dict(_outcome(run)) for name, run in runs.items()}
    keys = dict.fromkeys(key for results in found.values() for key in results)
    rows = [[key, *(results.get(key, "–") for results in found.values())] for key in keys]
    return Chapter(title="Results", tables=[Table(caption="Results", heads=("", *runs), rows=rows)])


def _outcome(run: Recorded) -> Iterator[tuple[str, str]]:
    summary = run.summary
    yield "status", str(summary.get("status", "–"))
    yield "steps", words.number(summary.get("steps", run.last_step))
    yield "trained for", words.seconds(summary.get("seconds") or (run.seconds() or [(0, None)])[-1][1])
    for name, value in (summary.get("metrics") or {}).items():
        yield name.replace("_", " "), words.metric(name, value)
    for weights, label in (("trained", "best test accuracy"), ("averaged", "best averaged test accuracy")):
        accuracies = [line["test_accuracy"] for line in run.evaluated(weights) if line.get("test_accuracy") is not None]
        if accuracies:
            yield label, words.share(max(accuracies))
    if (reached := summary.get("time_to_target") or {}).get("seconds") is not None:
        yield "time to the target", words.seconds(reached["seconds"])
    for part, label in (("p50", "step, p50"), ("p99", "step, p99")):
        yield label, words.seconds((summary.get("step_seconds") or {}).get(part))
    staleness = summary.get("staleness_steps") or {}
    yield "staleness, median", words.number(staleness.get("p50"))
    yield "staleness, largest", words.number(staleness.get("max"))
    inverted = merged_durations(run.windows, "inversions").values()
    yield "inversions", words.number(sum(each.count for each in inverted) or None)
    yield "seconds inverted", words.seconds(sum(each.total for each in inverted) or None)
    moved = sum(sum(totals["bytes"].values()) for totals in run.by_start())
    yield "bytes moved", words.size(moved)
    yield "noise scale", words.number(summary.get("noise_scale"))


def _configurations(runs: Mapping[str, Recorded]) -> Chapter:
    title = "Differences in configuration and versions"
    settings = [dict(_settings(run)) for run in runs.values()]
    keys = dict.fromkeys(key for each in settings for key in each)
    rows = [[key, *(each.get(key, "–") for each in settings)] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    if not rows:
        return Chapter(title=title, sentences=["There are none, but for names and places."])
    return Chapter(title=title, tables=[Table(caption=title, heads=("key", *runs), rows=rows)])


def _settings(run: Recorded) -> Iterator[tuple[str, Any]]:
    start = run.starts[-1] if run.starts else {}
    for key, value in flat(run.config):
        if not key.startswith(_WHERE):
            yield key, str(value).lower() if isinstance(value, bool) else str(value)
    if "world_size" in start:
        yield "ranks", str(start["world_size"])
    for key, value in {**(start.get("versions") or {}), **(start.get("hardware") or {})}.items():
        yield key, str(value)
