"""Finds how far larger batches save steps, for AdamW and for `kfdist.Optimizer` with its defaults.

    PYTHONPATH=. python -m benchmarks.large_batch [TASK ...] [--seeds SEEDS]

The batch of a task of `kfdist bench target` is doubled until the steps to a goal stop falling, by a tenth or more, for
both methods, or there are no more examples. At each batch the learning rate of each is tuned anew, with seed 0, over as
many values, and further ones where the best lies at an edge; what is reported are the medians of other seeds. A goal is
reached when three measurements in a row are at it. Steps are counted, not seconds: a busy machine changes nothing, as
inverses are adopted one step late (`FixedLag(1)`). Cells are written as they are done, and a cell that the file has
isn't trained again. What the file has is drawn beside it and printed.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kfdist
from kfdist.bench.contest_tasks import TASKS, Task
from kfdist.bench.measuring import measured
from kfdist.bench.results import as_json, table, write_result
from kfdist.bench.target_cells import IN_A_ROW, TUNING_SEED
from kfdist.bench.to_target import MOST_FURTHER_RATES, beyond
from kfdist.report.drawing import FAINT, SERIES, drawing, plain_powers

OUT = Path(__file__).parent / "results" / "large_batch.json"
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
STOPS_FALLING = 0.9
"""A doubled batch that needs more than this share of the steps before is the last one."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """How a task is trained with growing batches.

    Attributes:
        task: The task, with its goal.
        first: The smallest batch.
        examples: A training is given up after this many, or after `steps`.
        steps: At most.
        every: Examples between two measurements, at least a step's.
    """

    task: Task
    first: int
    examples: int
    steps: int
    every: int

    def at(self, batch: int) -> Task:
        """Returns the task with a batch of its own."""
        return replace(self.task, batch_size=batch, evaluation_period=max(1, self.every // batch))

    def most_steps(self, batch: int) -> int:
        """Returns after how many steps a training is given up."""
        return min(self.examples // batch, self.steps)


CURVES: Mapping[str, Curve] = {
    "digits-cnn": Curve(task=TASKS["digits-cnn"], first=32, examples=102_400, steps=400, every=64),
    "mnist-resnet": Curve(
        task=replace(TASKS["mnist-resnet"], goal=0.015, most_measured=2000, average_decay=0.0),
        first=128,
        examples=300_000,
        steps=800,
        every=1280,
    ),
    "character-gpt": Curve(
        task=replace(TASKS["character-gpt"], goal=1.6), first=16, examples=20_000, steps=800, every=160
    ),
}


def _adamw(model: nn.Module, lr: float, seed: int) -> torch.optim.Optimizer:
    del seed
    return torch.optim.AdamW(model.parameters(), lr=lr)


def _kfdist(model: nn.Module, lr: float, seed: int) -> kfdist.Optimizer:
    return kfdist.Optimizer(model, lr=lr, adoption=kfdist.FixedLag(1), seed=seed)


METHODS: Mapping[str, Callable[[nn.Module, float, int], Any]] = {"AdamW": _adamw, "kfdist.Optimizer": _kfdist}


def train(curve: Curve, method: str, batch: int, rate: float, seed: int) -> dict[str, Any]:
    """Trains once; returns "steps" to the goal, None where it isn't reached, and "last", the metric at the end."""
    task = curve.at(batch)
    model, batches, seen = task.model(seed), task.batches(seed), [(0, math.inf)]
    optimizer = METHODS[method](model, rate, seed)
    assert task.goal is not None, "tasks without a goal have no curve"
    for step in range(1, curve.most_steps(batch) + 1):
        inputs, targets = next(batches)
        optimizer.zero_grad()
        task.loss(model(inputs), targets).backward()
        optimizer.step()
        if step % task.evaluation_period == 0:
            seen.append((step, task.value(model)))
            held = len(seen) > IN_A_ROW and all(value <= task.goal for _, value in seen[-IN_A_ROW:])
            if held or not math.isfinite(seen[-1][1]):
                break
    if isinstance(optimizer, kfdist.Optimizer):
        optimizer.close()
    reached = all(value <= task.goal for _, value in seen[-IN_A_ROW:])
    last = seen[-1][1]
    return {
        "steps": seen[-IN_A_ROW][0] if reached else None,
        "last": float(f"{last:.4g}") if math.isfinite(last) else None,
    }


class Measurement:
    """The cells of a file, by task, method, batch, learning rate and seed.

    Args:
        out: The file.
        seeds: How many are reported.
    """

    def __init__(self, out: Path, seeds: int) -> None:
        self._out, self._seeds = out, seeds
        self.content: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"cells": {}}

    def steps(self, curve: Curve, name: str, method: str, batch: int) -> float:
        """Tunes and trains; returns the median steps, infinite where fewer than half of the seeds reach the goal."""
        rates = list(RATES)
        for rate in RATES:
            self._train(curve, name, method, batch, rate, TUNING_SEED)
        while len(rates) < len(RATES) + MOST_FURTHER_RATES:
            further = beyond(sorted(rates), best_rate(self.content["cells"], name, method, batch))
            if further is None:
                break
            self._train(curve, name, method, batch, further, TUNING_SEED)
            rates.append(further)
        rate = best_rate(self.content["cells"], name, method, batch)
        for seed in range(TUNING_SEED + 1, TUNING_SEED + 1 + self._seeds):
            self._train(curve, name, method, batch, rate, seed)
        return found_steps(self.content["cells"], name, method, batch)[1]

    def _train(self, curve: Curve, name: str, method: str, batch: int, rate: float, seed: int) -> None:
        cell = f"{name}/{method}/{batch}/{rate:g}/{seed}"
        if cell not in self.content["cells"]:
            found = measured(partial(train, curve, method, batch, rate, seed))
            cells = {**self.content["cells"], cell: {key: found.pop(key) for key in ("steps", "last")}}
            self.content = {**found, "cells": cells}
            self._out.write_text(as_json(self.content) + "\n", encoding="utf-8")


def _of(cells: Mapping[str, Any], name: str, method: str, batch: int) -> dict[tuple[float, int], Mapping[str, Any]]:
    """Returns cells by learning rate and seed."""
    begin = f"{name}/{method}/{batch}/"
    keys = {key: key.removeprefix(begin).split("/") for key in cells if key.startswith(begin)}
    return {(float(rate), int(seed)): cells[key] for key, (rate, seed) in keys.items()}


def best_rate(cells: Mapping[str, Any], name: str, method: str, batch: int) -> float:
    """Returns the rate with which the tuning seed reaches the goal first, or else comes closest."""
    tuning = {rate: cell for (rate, seed), cell in _of(cells, name, method, batch).items() if seed == TUNING_SEED}
    return min(tuning, key=lambda rate: (*(_finite(tuning[rate][key]) for key in ("steps", "last")), rate))


def found_steps(cells: Mapping[str, Any], name: str, method: str, batch: int) -> tuple[float, float]:
    """Returns the best rate and the median steps of the other seeds with it, infinite where most never arrive."""
    rate = best_rate(cells, name, method, batch)
    others = [c for (r, seed), c in _of(cells, name, method, batch).items() if r == rate and seed != TUNING_SEED]
    return rate, statistics.median(_finite(cell["steps"]) for cell in others)


def _finite(value: float | None) -> float:
    return math.inf if value is None else value


def batches_of(cells: Mapping[str, Any], name: str) -> list[int]:
    """Returns the batches of a task that both methods were trained with."""
    by_method = [{int(key.split("/")[2]) for key in cells if key.startswith(f"{name}/{method}/")} for method in METHODS]
    return sorted(set.intersection(*by_method))


def measure(measurement: Measurement, name: str, folder: Path | None) -> None:
    """Doubles a task's batch until neither method needs fewer steps."""
    curve, before = (
        replace(CURVES[name], task=replace(CURVES[name].task, folder=folder)),
        dict.fromkeys(METHODS, math.inf),
    )
    batch, examples = curve.first, len(curve.task.examples(test=False)[0])
    falls = set(METHODS)
    while batch <= examples and falls:
        steps = {method: measurement.steps(curve, name, method, batch) for method in METHODS}
        falls = {m for m in METHODS if before[m] == math.inf or steps[m] <= STOPS_FALLING * before[m]}
        before, batch = steps, 2 * batch


def describe(cells: Mapping[str, Any]) -> str:
    """Puts steps, and examples in thousands, into a table for each task."""
    blocks = []
    for name, curve in CURVES.items():
        rows = []
        for batch, method in product(batches_of(cells, name), METHODS):
            rate, steps = found_steps(cells, name, method, batch)
            there = math.isfinite(steps)
            rows.append(
                [
                    f"{batch:>5,} {method}",
                    f"{rate:g}",
                    f"{steps:g}" if there else "-",
                    batch * steps / 1e3 if there else None,
                ]
            )
        if rows:
            head = ["batch", "rate", "steps", "1,000 examples"]
            blocks.append(f"{name}: {curve.task.metric} {curve.task.goal:g}\n{table(head, rows)}")
    return "\n\n".join(blocks)


def plot(cells: Mapping[str, Any]) -> str:
    """Draws steps over the batch, with what halving them at each doubling would be."""
    names = [name for name in CURVES if batches_of(cells, name)]
    with drawing(0.5 + 2.4 * len(names), rows=len(names)) as drawn:
        for axes, name in zip(drawn.axes, names, strict=True):
            batches = batches_of(cells, name)
            for method, colour in zip(METHODS, SERIES, strict=False):
                points = [(batch, found_steps(cells, name, method, batch)[1]) for batch in batches]
                reached = [point for point in points if math.isfinite(point[1])]
                axes.plot(*_columns(reached), color=colour, marker="o", markersize=3, label=method)
                if reached:
                    (first, steps), *_ = reached
                    ideal = [(batch, first * steps / batch) for batch in batches if batch >= first]
                    axes.plot(*_columns(ideal), color=FAINT, linestyle=":", linewidth=0.8)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            plain_powers(axes.yaxis)
            low, high = axes.get_ylim()
            ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if low <= tick <= high]
            axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
            axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
            axes.set_title(f"{name}: steps to {CURVES[name].task.metric} {CURVES[name].task.goal:g}")
        drawn.axes[-1].set_xlabel("examples a step")
        if len(names) == 1:
            drawn.legend(list(METHODS))
        else:
            inches = drawn.figure.get_figheight()
            drawn.figure.subplots_adjust(left=0.12, right=0.98, bottom=0.75 / inches, top=1 - 0.3 / inches, hspace=0.35)
            drawn.figure.legend(*drawn.axes[0].get_legend_handles_labels(), loc="lower center", ncols=2)
    return drawn.svg


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def main() -> None:
    """Trains what the file doesn't have yet, writes after each, draws and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(CURVES)}; all if none is named")
    parser.add_argument("--seeds", type=int, default=3, help="how many are reported")
    parser.add_argument("--data", type=Path, help="the folder with MNIST's files, for its task")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    measurement = Measurement(arguments.out, arguments.seeds)
    for name in arguments.tasks or [name for name in CURVES if arguments.data or not CURVES[name].task.needs_folder]:
        measure(measurement, name, arguments.data)
    content = measurement.content
    write_result(arguments.out, content, plot(content["cells"]))
    print(describe(content["cells"]))


if __name__ == "__main__":
    main()
