"""`kfdist bench target`: seconds and steps to a target, for kfdist and for first-order optimizers.

A cell is one training: a task, a rival, a learning rate, a seed. It is written as soon as it is done, and a cell that
the file has isn't trained again, so that a measurement may be interrupted, and extended by new tasks, rivals, rates and
seeds. Seconds are those of training on one thread, the first inversion included and evaluations left out; kfdist's
inversions run on another core.
"""

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch

from kfdist import checks
from kfdist.bench.contest import RIVALS, TASKS, Rival, Task
from kfdist.bench.results import table
from kfdist.bench.timings import Cores, running_on
from kfdist.errors import ConfigError
from kfdist.report.drawing import INK, SERIES, drawing, plain_powers

_MOST_POINTS = 120

IN_A_ROW = 3
"""Measurements at the goal that count as having reached it: a loss that jumps about is below it at times."""


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """What is measured.

    Attributes:
        tasks: Keys of `TASKS`; all if empty.
        rivals: Keys of `RIVALS`; all if empty.
        seconds: Of training, at most; a task's own if None.
        seeds: How many, from 0.
    """

    tasks: Sequence[str] = ()
    rivals: Sequence[str] = ()
    seconds: float | None = None
    seeds: int = 1

    def __post_init__(self) -> None:
        for name in self.tasks:
            checks.choice("--task", name, TASKS)
        for name in self.rivals:
            checks.choice("--rival", name, RIVALS)
        checks.count("--seeds", self.seeds, least=1)
        if self.seconds is not None:
            checks.number("--seconds", self.seconds, above=0)

    def cells(self) -> Iterator[tuple[str, str, float, int]]:
        """Yields task, rival, learning rate and seed of every training."""
        for task, rival, seed in product(self.tasks or TASKS, self.rivals or RIVALS, range(self.seeds)):
            for rate in RIVALS[rival].rates:
                yield task, rival, rate, seed


def measure_target(
    settings: TargetSettings, known: Mapping[str, Any], done: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Trains every cell that isn't known yet.

    Args:
        settings: Which cells.
        known: Those that are known, by `cell_name`; one that had fewer seconds is trained again.
        done: Told what is known after each one.

    Returns:
        "cells", by name, the known ones with them, and "config".
    """
    cells, content = dict(known), {"bench": "target", "config": {"threads": torch.get_num_threads(), "goals": _goals()}}
    for task, rival, rate, seed in settings.cells():
        name = cell_name(task, rival, rate, seed)
        work = TASKS[task] if settings.seconds is None else replace(TASKS[task], seconds=settings.seconds)
        if name not in cells or cells[name]["limit"] < work.seconds:
            cells[name] = {**train(work, RIVALS[rival], rate, seed), "task": task, "rival": rival}
            done({**content, "cells": cells})
    return {**content, "cells": cells}


def cell_name(task: str, rival: str, rate: float, seed: int) -> str:
    """Returns the name of a cell."""
    return f"{task}/{rival}/{rate:g}/{seed}"


def _goals() -> dict[str, Any]:
    return {name: {"metric": task.metric, "goal": task.goal, "title": task.title} for name, task in TASKS.items()}


def train(task: Task, rival: Rival, rate: float, seed: int) -> dict[str, Any]:
    """Trains until the goal is held, or for the task's seconds; returns when it was reached and how the metric fell."""
    cores, model = Cores(), task.model(seed)
    if rival.whole:
        task = replace(task, batch_size=len(task.examples(test=False)[0]))
    batches, curve, spent, steps = task.batches(seed), [(0.0, 0, task.value(model))], 0.0, 0
    with running_on(cores.others), rival.training(task, model, rate) as step, running_on(cores.training):
        while spent < task.seconds and math.isfinite(curve[-1][2]) and not held(curve, task.goal):
            for _ in range(1 if rival.whole else task.evaluation_period):
                batch = next(batches)
                begun = time.perf_counter()
                step(batch)
                spent += time.perf_counter() - begun
                steps += 1
            curve.append((round(spent, 4), steps, task.value(model)))
    first = curve[-IN_A_ROW] if held(curve, task.goal) else None
    return {
        "rate": rate,
        "seed": seed,
        "limit": task.seconds,
        "seconds": first and first[0],
        "steps": first and first[1],
        "steps_done": steps,
        "milliseconds_a_step": round(1e3 * spent / max(steps, 1), 3),
        "last": curve[-1][2] if math.isfinite(curve[-1][2]) else None,
        "curve": [point for point in _thinned(curve) if math.isfinite(point[2])],
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": round(os.getloadavg()[0], 2),
    }


def held(curve: Sequence[Sequence[float]], goal: float) -> bool:
    """Says whether the last measurements were all at the goal.

    Args:
        curve: (seconds, steps, value).
        goal: Of the value, or less.
    """
    return len(curve) >= IN_A_ROW and all(point[2] <= goal for point in curve[-IN_A_ROW:])


def _thinned(curve: list[tuple[float, int, float]]) -> list[tuple[float, int, float]]:
    every = math.ceil(len(curve) / _MOST_POINTS)
    return [*curve[:-1:every], curve[-1]]


def known_cells(file: Path) -> dict[str, Any]:
    """Returns the cells of an earlier measurement.

    Raises:
        ConfigError: The file is of something else.
    """
    if not file.exists():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError, TypeError, OSError):
        raise ConfigError(f"{str(file)!r} has no cells of this measurement; name another file", path="--out") from None


def best(cells: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Chooses a rival's best learning rate on a task, and sums its seeds up.

    The best one reaches the goal with most seeds, and then soonest; where none does, it comes closest.

    Args:
        cells: The rival's, of all rates and seeds.

    Returns:
        Medians over the seeds: "seconds" and "steps" are None where fewer than half of them reached the goal. None
        without a cell.
    """
    by_rate: dict[float, list[Mapping[str, Any]]] = {}
    for cell in cells:
        by_rate.setdefault(cell["rate"], []).append(cell)
    if not by_rate:
        return None

    def median(of_rate: Sequence[Mapping[str, Any]], name: str) -> float:
        return statistics.median(math.inf if cell[name] is None else cell[name] for cell in of_rate)

    rate, chosen = min(by_rate.items(), key=lambda each: (median(each[1], "seconds"), median(each[1], "last"), each[0]))
    found = {name: median(chosen, name) for name in ("seconds", "steps", "last", "milliseconds_a_step")}
    summed = {name: value if math.isfinite(value) else None for name, value in found.items()}
    return {"rate": rate, "at_edge": rate in (min(by_rate), max(by_rate)), "seeds": len(chosen), **summed}


def describe(content: Mapping[str, Any]) -> str:
    """Puts a measurement into tables, one a task."""
    blocks = []
    for name, task in content["config"]["goals"].items():
        rows = [
            [
                RIVALS[rival].title if rival in RIVALS else rival,
                f"{found['rate']:g}{'*' if found['at_edge'] else ''}",
                *(found[key] for key in ("milliseconds_a_step", "seconds", "steps", "last", "seeds")),
            ]
            for rival in _rivals_of(content, name)
            if (found := best(_cells_of(content, name, rival))) is not None
        ]
        head = ["", "rate", "ms a step", "seconds", "steps", "last", "seeds"]
        if rows:
            blocks.append(f"{task['title']}: {task['metric']} {task['goal']:g}\n{table(head, rows)}")
    marks = f"*: the best rate is at an edge of those tried; -: not reached, {IN_A_ROW} measurements in a row"
    return "\n\n".join([*blocks, marks])


def _rivals_of(content: Mapping[str, Any], task: str) -> list[str]:
    return list(dict.fromkeys(cell["rival"] for cell in content["cells"].values() if cell["task"] == task))


def _cells_of(content: Mapping[str, Any], task: str, rival: str) -> list[Mapping[str, Any]]:
    return [cell for cell in content["cells"].values() if (cell["task"], cell["rival"]) == (task, rival)]


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
                    cells = _cells_of(content, task, rival)
                    found = best(cells)
                    cell = next(each for each in cells if found is not None and each["rate"] == found["rate"])
                    colour = SERIES[known.index(rival) % len(SERIES)]
                    points = [point for point in cell["curve"] if point[column] > 0]
                    axes.plot([p[column] for p in points], [p[2] for p in points], color=colour, label=rival)
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
            left=0.14, right=0.98, bottom=0.85 / inches, top=1 - 0.25 / inches, hspace=0.5, wspace=0.3
        )
        handles = {
            label: line for axes in drawn.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        drawn.figure.legend(list(handles.values()), list(handles), loc="lower center", ncols=3)
    return drawn.svg
