"""What the cells of `kfdist bench target` say: whose best rate reached a target when, as tables and curves."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kfdist.bench.contest_rivals import RIVALS
from kfdist.bench.results import table
from kfdist.errors import ConfigError
from kfdist.report.drawing import INK, SERIES, drawing, plain_powers

IN_A_ROW = 3
"""Measurements at the goal that count as having reached it: a loss that jumps about is below it at times."""

TUNING_SEED = 0
"""Learning rates are tuned with it; reported are those after it."""


def known_cells(file: Path) -> dict[str, Any]:
    """Returns the cells of an earlier measurement, but for those of rivals that there are no more.

    Raises:
        ConfigError: The file is of something else, or of a version whose cells were made otherwise.
    """
    if not file.exists():
        return {}
    try:
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        made_alike = {name: {**cell, "apart": bool(cell["apart"])} for name, cell in cells.items()}
        return {name: cell for name, cell in made_alike.items() if cell["rival"] in RIVALS}
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise ConfigError(
            f"{str(file)!r} has no cells of this version's measurement; name another file", path="--out"
        ) from None


def tuning_cells(cells: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns those of the tuning seed, the best first: soonest at the goal or, where none is, closest to it."""
    own = [cell for cell in cells if cell["seed"] == TUNING_SEED and not cell["apart"]]
    return sorted(own, key=lambda cell: (*(or_infinite(cell[name]) for name in ("seconds", "last")), cell["rate"]))


def ranked_rates(cells: Iterable[Mapping[str, Any]]) -> list[float]:
    """Returns the learning rates that were tried with the tuning seed, the best first."""
    return [cell["rate"] for cell in tuning_cells(cells)]


def best(cells: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Chooses a rival's best learning rate on a task, and sums its other seeds up.

    Of the rates that seeds beside the tuning one were trained with, it is the one whose medians reach the goal soonest
    or, where none does, come closest; without any, it is the tuning seed's.

    Args:
        cells: The rival's, of all rates and seeds.

    Returns:
        Medians over the seeds that weren't tuned with, of the tuning one where there are no others yet: "seconds",
        "apart_seconds", those on a core for training alone, and "steps" are None where fewer than half of them reached
        the goal. None without a cell.
    """
    every = list(cells)
    tuning = tuning_cells(every)
    if not tuning:
        return None
    reported: dict[float, list[Mapping[str, Any]]] = {}
    for cell in every:
        if cell["seed"] != TUNING_SEED and not cell["apart"]:
            reported.setdefault(cell["rate"], []).append(cell)
    most = max(map(len, reported.values()), default=0)
    whole = {rate: found for rate, found in reported.items() if len(found) == most}
    chosen = tuning[0]
    rate = min(whole, key=lambda rate: (*_reached(whole[rate]), rate), default=chosen["rate"])
    shown, rates = whole.get(rate, [chosen]), [cell["rate"] for cell in tuning]
    apart = [cell for cell in every if cell["rate"] == rate and cell["seed"] != TUNING_SEED and cell["apart"]]
    return {
        "rate": rate,
        "at_edge": len(rates) > 1 and rate in (min(rates), max(rates)),
        "tuned": not whole,
        "seeds": len(shown),
        **{name: _median(shown, name) for name in ("seconds", "steps", "last", "milliseconds_a_step")},
        "apart_seconds": _median(apart, "seconds"),
    }


def _reached(cells: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Returns the medians by which rates are compared, infinite where there is none."""
    return or_infinite(_median(cells, "seconds")), or_infinite(_median(cells, "last"))


def or_infinite(value: float | None) -> float:
    """Returns the number; infinity for None, which so comes last."""
    return math.inf if value is None else value


def _median(cells: Sequence[Mapping[str, Any]], name: str) -> float | None:
    found = statistics.median([or_infinite(cell[name]) for cell in cells]) if cells else math.inf
    return found if math.isfinite(found) else None


def describe(content: Mapping[str, Any]) -> str:
    """Puts a measurement into tables, one a task."""
    blocks = []
    for name, task in content["config"]["goals"].items():
        rows = []
        for rival in _rivals_of(content, name):
            found = best(cells_of(content["cells"], name, rival))
            if found is not None:
                title = RIVALS[rival].title if rival in RIVALS else rival
                rate = f"{found['rate']:g}{'*' if found['at_edge'] else ''}" if found["rate"] else "none"
                keys = ("milliseconds_a_step", "seconds", "apart_seconds", "steps", "last")
                rows.append(
                    [title, rate, *(found[key] for key in keys), f"{found['seeds']}{'+' if found['tuned'] else ''}"]
                )
        head = ["", "rate", "ms a step", "seconds", "own core", "steps", "last", "seeds"]
        if rows:
            goal = "not known yet" if task["goal"] is None else f"{task['goal']:.4g}"
            blocks.append(f"{task['title']}: {task['metric']} {goal}\n{table(head, rows)}")
    marks = (
        f"two threads on two cores; *: the best rate is at an edge of those tried; -: not reached, {IN_A_ROW} "
        "measurements in a row; own core: seconds where training has one core and one thread, and inversions have the "
        "other core; +: the seed that rates were tuned with"
    )
    return "\n\n".join([*blocks, marks])


def _rivals_of(content: Mapping[str, Any], task: str) -> list[str]:
    return list(dict.fromkeys(cell["rival"] for cell in content["cells"].values() if cell["task"] == task))


def cells_of(cells: Mapping[str, Mapping[str, Any]], task: str, rival: str) -> list[Mapping[str, Any]]:
    """Returns the cells of a rival on a task."""
    return [cell for cell in cells.values() if (cell["task"], cell["rival"]) == (task, rival)]


def plot(content: Mapping[str, Any]) -> str:
    """Draws how the metric falls over seconds and over steps, for each task and each rival's best rate."""
    goals = content["config"]["goals"]
    tasks = [name for name in goals if _rivals_of(content, name)]
    known = list(dict.fromkeys(cell["rival"] for cell in content["cells"].values()))
    with drawing(0.9 + 2.1 * len(tasks), rows=max(len(tasks), 1), columns=2) as drawn:
        for row, task in enumerate(tasks):
            for column, unit in enumerate(("seconds", "steps")):
                axes = drawn.axes[2 * row + column]
                for rival in _rivals_of(content, task):
                    cell = _typical(cells_of(content["cells"], task, rival))
                    colour = SERIES[known.index(rival) % len(SERIES)]
                    points = [point for point in cell["curve"] if point[column] > 0]
                    axes.plot([p[column] for p in points], [p[2] for p in points], color=colour, label=rival)
                if goals[task]["goal"] is not None:
                    axes.axhline(goals[task]["goal"], color=INK, linewidth=0.8, linestyle="--")
                axes.set_xscale("log")
                axes.set_yscale("log")
                plain_powers(axes.xaxis)
                plain_powers(axes.yaxis)
                axes.set_xlabel(unit)
                if column == 0:
                    axes.set_ylabel(goals[task]["metric"])
                axes.set_title(task if column == 0 else "")
        inches = drawn.figure.get_figheight()
        drawn.figure.subplots_adjust(
            left=0.14,
            right=0.98,
            bottom=(0.5 + 0.19 * math.ceil(len(known) / 3)) / inches,
            top=1 - 0.25 / inches,
            hspace=0.5,
            wspace=0.3,
        )
        handles = {
            label: line for axes in drawn.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        drawn.figure.legend(list(handles.values()), list(handles), loc="lower center", ncols=3)
    return drawn.svg


def _typical(cells: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Returns the cell of the best rate whose seconds are in the middle."""
    found = best(cells)
    assert found is not None, "a rival that is drawn was tuned"
    seeds = [each for each in cells if each["rate"] == found["rate"] and not each["apart"]]
    reported = [each for each in seeds if found["tuned"] or each["seed"] != TUNING_SEED]
    return sorted(reported, key=lambda cell: or_infinite(cell["seconds"]))[len(reported) // 2]
