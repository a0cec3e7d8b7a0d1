"""`kfdist bench target`: seconds and steps to a target, for kfdist and for others.

A cell is one training: a task, a rival, a learning rate, a seed. It is written as soon as it is done, and a cell that
the file has isn't trained again, so that a measurement may be interrupted, and extended by new tasks, rivals and seeds.
A rival's learning rate is tuned with one seed, over as many values for each, two a decade, further ones where the best
lies at an edge, and then halfway to its neighbours. Other seeds are reported, with which the best rates of the tuning
are trained, by default one and for short tasks two, so that an unlucky tuning doesn't make a rival look slow. Seconds
are those of training, the first inversion included and evaluations left out. Everyone has two cores and trains on two
threads, between which kfdist's inversions find their place; a second time kfdist trains on one thread and has the other
core invert.
"""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from kfdist import checks
from kfdist.bench.contest_rivals import RIVALS, Rival
from kfdist.bench.contest_tasks import FIRST_DATA, TASKS, Task
from kfdist.bench.target_cells import IN_A_ROW, TUNING_SEED, best, cells_of, or_infinite, ranked_rates, tuning_cells
from kfdist.bench.timings import Cores, running_on
from kfdist.errors import ConfigError

_MOST_POINTS = 120

MOST_FURTHER_RATES = 3
"""Learning rates beyond those given that are tried where the best lies at an edge."""

_SHORT_SECONDS = 30.0
"""Of tasks that last at most so long two rates are trained with the reported seeds, of others one."""

_SLACK = 1.5
"""A rate is tuned for so many times the seconds in which the best one so far reached the goal: it can't win later,
and has to hold the goal for some measurements."""

_HOPELESS_AFTER = 0.25
"""Of a long task's seconds, after which a rate that is tuned is given up where its best value so far is more than
`_SLACK` times what the best rate had by then."""

_NEAR = 2.0
"""Rates with a lesser quotient count as tuned; two a decade are 3 and 3.3 times apart, those halfway 1.7 to 1.9."""


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """What is measured.

    Attributes:
        tasks: Keys of `TASKS`; if empty, all whose data are there.
        rivals: Keys of `RIVALS`; all if empty.
        seconds: Of training, at most; a task's own if None.
        seeds: How many are reported; 0 only tunes.
        folder: Where the data of tasks are that aren't in a package.
    """

    tasks: Sequence[str] = ()
    rivals: Sequence[str] = ()
    seconds: float | None = None
    seeds: int = 3
    folder: Path | None = None

    def __post_init__(self) -> None:
        for name in self.tasks:
            checks.choice("--task", name, TASKS)
            if TASKS[name].needs_folder:
                TASKS[name].data(self.folder)  # it says what is wrong before others have trained
        for name in self.rivals:
            checks.choice("--rival", name, RIVALS)
        checks.count("--seeds", self.seeds, least=0)
        if self.seconds is not None:
            checks.number("--seconds", self.seconds, above=0)

    def work(self) -> Iterator[tuple[str, Task]]:
        """Yields the tasks to do, by their names."""
        there = [name for name, task in TASKS.items() if self.folder is not None or not task.needs_folder]
        for name in self.tasks or there:
            task = replace(TASKS[name], folder=self.folder)
            yield name, task if self.seconds is None else replace(task, seconds=self.seconds)

    def competitors(self) -> list[str]:
        """Returns the rivals and those whose rates they take, in the order of `RIVALS`."""
        chosen = set(self.rivals or RIVALS)
        chosen |= {RIVALS[name].rate_of for name in chosen}
        return [name for name in RIVALS if name in chosen]


class Contest:
    """The cells of a measurement.

    Args:
        known: Those that are known, by `cell_name`; one that had fewer seconds or another goal is trained again.
        done: Told all that is known after each training.
    """

    def __init__(self, known: Mapping[str, Any], done: Callable[[dict[str, Any]], None]) -> None:
        self._cells = dict(known)
        self._done = done
        self._goals = {
            name: {"metric": task.metric, "goal": task.goal, "title": task.title} for name, task in TASKS.items()
        }
        for name, goal in self._goals.items():
            goal["goal"] = self._goal(name)

    def content(self) -> dict[str, Any]:
        """Returns "cells", by name, and "config"."""
        config = {"goals": self._goals, "tuning_seed": TUNING_SEED}
        return {"bench": "target", "config": config, "cells": self._cells}

    def hold(self, name: str, task: Task, competitors: Sequence[str], seeds: int) -> None:
        """Tunes and trains everyone on a task.

        Raises:
            ConfigError: The goal is what others reach, and there are none.
        """
        for rival in competitors:
            goal = self._goal(name) if task.goal is None and RIVALS[rival].kfdist else task.goal
            if goal is None and RIVALS[rival].kfdist:
                raise ConfigError(
                    f"{name}'s goal is what the best of the others reaches, and none of them was trained; add one, "
                    "such as --rival adamw",
                    path="--rival",
                )
            work = replace(task, goal=goal)
            self._forget_other_terms(name, work, rival)
            self._tune(name, work, rival)
            ranked = ranked_rates(cells_of(self._cells, name, rival))
            for rate in ranked[: 2 if task.seconds <= _SHORT_SECONDS else 1]:
                for seed in range(TUNING_SEED + 1, TUNING_SEED + 1 + seeds):
                    self._train(name, work, rival, rate, seed)
            for seed in range(TUNING_SEED + 1, TUNING_SEED + 1 + seeds) if RIVALS[rival].kfdist else ():
                self._train(name, work, rival, self._best_rate(name, rival), seed, apart=True)
            self._goals[name]["goal"] = self._goal(name)

    def _forget_other_terms(self, name: str, task: Task, rival: str) -> None:
        """Lets go of a rival's cells of fewer seconds, another goal or data, or a rate that its leader has no more."""
        for cell in cells_of(self._cells, name, rival):
            same = cell["limit"] >= task.seconds and cell["goal"] == task.goal
            same = same and cell.get("data_version", FIRST_DATA) == task.data_version
            leader = RIVALS[rival].rate_of
            if not same or (leader and cell["rate"] != self._best_rate(name, leader)):
                del self._cells[cell_name(name, rival, cell["rate"], cell["seed"], apart=cell["apart"])]

    def _tune(self, name: str, task: Task, rival: str) -> None:
        given = RIVALS[rival].rates
        if leader := RIVALS[rival].rate_of:
            given = (self._best_rate(name, leader),)
        for rate in given:
            self._try(name, task, rival, rate)
        while len(given) > 1:
            tried = sorted({each["rate"] for each in cells_of(self._cells, name, rival)} | set(given))
            further = next_rate(tried, self._tuned_rate(name, rival), least=given[0], most=given[-1])
            if further is None:
                break
            self._try(name, task, rival, further)

    def _try(self, name: str, task: Task, rival: str, rate: float) -> None:
        """Trains with the tuning seed for as long as the rate may still turn out to be a rival's best."""
        tuning = tuning_cells(cells_of(self._cells, name, rival))
        within = _SLACK * min((or_infinite(cell["seconds"]) for cell in tuning), default=math.inf)
        beside = tuning[0]["curve"] if tuning and task.seconds > _SHORT_SECONDS else ()
        self._train(name, task, rival, rate, TUNING_SEED, within=within, beside=beside)

    def _tuned_rate(self, name: str, rival: str) -> float:
        return ranked_rates(cells_of(self._cells, name, rival))[0]

    def _best_rate(self, name: str, rival: str) -> float:
        found = best(cells_of(self._cells, name, rival))
        assert found is not None, "competitors come after those whose rates they take"
        return found["rate"]

    def _train(
        self,
        name: str,
        task: Task,
        rival: str,
        rate: float,
        seed: int,
        *,
        within: float = math.inf,
        beside: Sequence[Sequence[float]] = (),
        apart: bool = False,
    ) -> None:
        cell = cell_name(name, rival, rate, seed, apart=apart)
        if cell not in self._cells:
            limited = replace(task, seconds=min(task.seconds, within))
            found = train(limited, RIVALS[rival], rate, seed, beside=beside, behind=early(task), apart=apart)
            self._cells[cell] = {**found, "task": name, "rival": rival, "limit": task.seconds}
            self._done(self.content())

    def _goal(self, name: str) -> float | None:
        """Returns a task's goal; where it is what the best of the others reaches, None before there are any."""
        if TASKS[name].goal is not None:
            return TASKS[name].goal
        others = [best(cells_of(self._cells, name, rival)) for rival in RIVALS if not RIVALS[rival].kfdist]
        return min((each["last"] for each in others if each is not None and each["last"] is not None), default=None)


def measure_target(
    settings: TargetSettings, known: Mapping[str, Any], done: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Trains every cell that isn't known yet; see `Contest`.

    Returns:
        "cells", by name, the known ones with them, and "config".
    """
    contest = Contest(known, done)
    for name, task in settings.work():
        contest.hold(name, task, settings.competitors(), settings.seeds)
    return contest.content()


def cell_name(task: str, rival: str, rate: float, seed: int, *, apart: bool = False) -> str:
    """Returns the name of a cell."""
    return f"{task}/{rival}/{rate:g}/{seed}{'/apart' if apart else ''}"


def next_rate(rates: Sequence[float], chosen: float, *, least: float, most: float) -> float | None:
    """Returns the learning rate to try next.

    Args:
        rates: Those that were tried, growing.
        chosen: The best of them.
        least: The least of those that tuning began with.
        most: The greatest.

    Returns:
        The next of two a decade beyond the edge that the chosen one is, at most `MOST_FURTHER_RATES`; then what is
        halfway, in logarithms, to a neighbour that is two a decade away; None if both are nearer.
    """
    place = rates.index(chosen)
    edge = place in (0, len(rates) - 1)
    beyond_given = sum(not least <= rate <= most for rate in rates)
    if edge and beyond_given < MOST_FURTHER_RATES:
        return beyond(rates, chosen)
    around = rates[max(place - 1, 0) : place + 2]
    wide = [(below, above) for below, above in itertools.pairwise(around) if above > _NEAR * below]
    return float(f"{math.sqrt(wide[0][0] * wide[0][1]):.2g}") if wide else None


def beyond(rates: Sequence[float], chosen: float) -> float | None:
    """Returns the next learning rate, of two a decade, beyond the edge that the chosen one is; None if it is none."""
    digits = f"{chosen:e}"[0]
    if chosen == rates[-1]:
        return float(f"{chosen * (10 / 3 if digits == '3' else 3):.6g}")
    return float(f"{chosen / (3 if digits == '3' else 10 / 3):.6g}") if chosen == rates[0] else None


def train(
    task: Task,
    rival: Rival,
    rate: float,
    seed: int,
    *,
    beside: Sequence[Sequence[float]] = (),
    behind: float = 0.0,
    apart: bool = False,
) -> dict[str, Any]:
    """Trains until the goal is held, or for the task's seconds; returns when it was reached and how the metric fell.

    Args:
        task: What to reach.
        rival: Who trains.
        rate: Its learning rate.
        seed: Of the model and the batches.
        beside: The curve of another rate; see `hopeless`.
        behind: Seconds before which the two aren't compared.
        apart: Whether it trains on one core, on one thread, and inverts on another; else on both, on a thread for each.
    """
    cores, model = Cores(), task.model(seed)
    training = cores.training if apart else sorted({*cores.training, *cores.others})
    others = cores.others if apart else training
    goal = -math.inf if task.goal is None else task.goal
    if rival.whole:
        task = replace(task, batch_size=len(task.examples(test=False)[0]))
    average = task.average(model)
    measured = model if average is None else average
    batches, curve, spent, steps = task.batches(seed), [(0.0, 0, task.value(measured))], 0.0, 0
    with (
        _computing_on(len(training)),
        running_on(others),
        rival.training(task, model, rate) as step,
        running_on(training),
    ):
        while spent < task.seconds and math.isfinite(curve[-1][2]) and not held(curve, goal):
            for _ in range(1 if rival.whole else task.evaluation_period):
                batch = next(batches)
                begun = time.perf_counter()
                step(batch)
                if average is not None:
                    average.update_parameters(model)
                spent += time.perf_counter() - begun
                steps += 1
            curve.append((round(spent, 4), steps, task.value(measured)))
            if spent >= behind and hopeless(curve, beside):
                break
    first = curve[-IN_A_ROW] if held(curve, goal) else None
    return {
        "rate": rate,
        "seed": seed,
        "apart": apart,
        "threads": len(training),
        "limit": task.seconds,
        "goal": task.goal,
        "data_version": task.data_version,
        "seconds": first and first[0],
        "steps": first and first[1],
        "steps_done": steps,
        "milliseconds_a_step": round(1e3 * spent / max(steps, 1), 3),
        "last": curve[-1][2] if math.isfinite(curve[-1][2]) else None,
        "curve": [point for point in _thinned(curve) if math.isfinite(point[2])],
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": round(os.getloadavg()[0], 2),
    }


@contextmanager
def _computing_on(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def held(curve: Sequence[Sequence[float]], goal: float) -> bool:
    """Says whether the last measurements were all at the goal.

    Args:
        curve: (seconds, steps, value).
        goal: Of the value, or less.
    """
    return len(curve) >= IN_A_ROW and all(point[2] <= goal for point in curve[-IN_A_ROW:])


def early(task: Task) -> float:
    """Returns the seconds of a task in which no rate that is tuned is given up."""
    return _HOPELESS_AFTER * task.seconds


def hopeless(curve: Sequence[Sequence[float]], beside: Sequence[Sequence[float]]) -> bool:
    """Says whether the least value so far is far above the least one of another curve by the same second.

    Args:
        curve: (seconds, steps, value).
        beside: Likewise; may be empty.
    """
    by_then = [point[2] for point in beside if point[0] <= curve[-1][0]]
    return bool(by_then) and min(point[2] for point in curve) > _SLACK * min(by_then)


def _thinned(curve: list[tuple[float, int, float]]) -> list[tuple[float, int, float]]:
    every = math.ceil(len(curve) / _MOST_POINTS)
    return [*curve[:-1:every], curve[-1]]
