"""Shows what the savings that change numbers cost in steps: rows drawn by cost, eigenpairs cut by damping, a low rank.

    PYTHONPATH=. python -m benchmarks.savings [TASK ...] [--seeds SEEDS]

Each task is trained with the defaults of `rs-kfac`, with either saving undone, with both undone, and with all
eigenpairs of all rows, which is K-FAC without an approximation of its own. Everything else is the task's and equal:
model, batches, rates, damping, periods, seeds. Inverses are adopted three steps late (`FixedLag(3)`), so that steps can
be repeated bit for bit on one machine. Counted are steps to some goals of each task; a goal is reached when three
measurements in a row are at it. A saving costs nothing where its median over the seeds lies among the seeds of the
exact one, or below. Cells are written as they are done, and a cell that the file has isn't trained again.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kfdist
from kfdist.bench.contest import TASKS, Task
from kfdist.bench.measuring import measured
from kfdist.bench.results import as_json, table
from kfdist.bench.to_target import IN_A_ROW

RESULT = Path(__file__).parent / "results" / "savings.json"
LAG = 3
WHOLE = kfdist.Sampling(examples_fraction=1.0)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """What is saved.

    Attributes:
        sampling: Rows that the factors are made of.
        inverter: Settings of rs-kfac.
    """

    sampling: kfdist.Sampling = kfdist.Sampling()
    inverter: Mapping[str, float] = {}


EXACT = "all rows, all pairs"
CONTENDERS = {
    "defaults": Contender(),
    "all pairs found": Contender(inverter={"direction_error": 0.0}),
    "all rows": Contender(sampling=WHOLE),
    "all rows, all pairs found": Contender(sampling=WHOLE, inverter={"direction_error": 0.0}),
    EXACT: Contender(sampling=WHOLE, inverter={"direction_error": 0.0, "rank": 100_000}),
}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How a task is trained.

    Attributes:
        task: The task.
        shown: What its metric is computed by, of outputs and targets; None: its loss.
        goals: Values of the metric, falling.
        steps: At most.
        lr: Of SGD with momentum 0.9, constant.
        settings: Of the preconditioner.
    """

    task: Task
    shown: Callable[[Tensor, Tensor], Tensor] | None = None
    goals: Sequence[float]
    steps: int
    lr: float = 0.1
    settings: Mapping[str, Any]

    def value(self, model: nn.Module) -> float:
        """Measures the metric."""
        return (self.task if self.shown is None else replace(self.task, loss=self.shown)).value(model)


def perceptron() -> nn.Sequential:
    """Makes an MLP of two hidden layers, wide for its data."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def error_rate(output: Tensor, labels: Tensor) -> Tensor:
    """Returns the share of examples whose largest output isn't their label's."""
    return (output.argmax(1) != labels).float().mean()


OFTEN = {"factor_period": 2, "inverse_period": 10}
CNN = TASKS["digits-cnn"]
TRIALS: Mapping[str, Trial] = {
    "run": Trial(
        task=replace(CNN, title="digits run", metric="test error", evaluation_period=1),
        shown=error_rate,
        goals=(0.03, 0.02),
        steps=80,
        settings={**OFTEN, "damping": 0.03, "kl_clip": 1e-2},
    ),
    "cnn": Trial(task=CNN, goals=(0.1, 0.05, 0.032), steps=140, settings={**OFTEN, "damping": 0.03}),
    "mlp": Trial(
        task=replace(CNN, title="MLP 64-512-512-10", metric="training loss", build=perceptron, on_test=False),
        goals=(0.3, 0.1, 0.03),
        steps=140,
        settings={**OFTEN, "damping": 0.03},
    ),
    "autoencoder": Trial(
        task=TASKS["digits-autoencoder"],
        goals=(0.03, 0.01),
        steps=400,
        settings={"factor_period": 5, "inverse_period": 20, "fisher": "mc"},
    ),
}


def steps_to(goals: Sequence[float], curve: Iterable[tuple[int, float]]) -> list[int | None]:
    """Returns the first step at which each goal was reached for as many measurements in a row as count; None: never."""
    points = list(curve)
    runs = [points[i : i + IN_A_ROW] for i in range(len(points) - IN_A_ROW + 1)]
    return [next((run[0][0] for run in runs if all(value <= goal for _, value in run)), None) for goal in goals]


def train(trial: Trial, contender: Contender, seed: int) -> dict[str, Any]:
    """Trains once; returns "steps" to each goal and "last", the metric at the end."""
    task = trial.task
    model, batches = task.model(seed), task.batches(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=trial.lr, momentum=0.9)
    curve: list[tuple[int, float]] = []
    with kfdist.Preconditioner(
        model,
        kfdist.RsKfac(**contender.inverter),
        sampling=contender.sampling,
        lr=trial.lr,
        adoption=kfdist.FixedLag(LAG),
        seed=seed,
        **trial.settings,
    ) as preconditioner:
        for step in range(1, trial.steps + 1):
            inputs, targets = next(batches)
            optimizer.zero_grad()
            output = model(inputs)
            preconditioner.observe(output, task.loss_name)
            task.loss(output, targets).backward()
            preconditioner.step()
            optimizer.step()
            if step % task.evaluation_period == 0:
                curve.append((step, trial.value(model)))
    return {"steps": steps_to(trial.goals, curve), "last": float(f"{curve[-1][1]:.4g}")}


def median(values: Iterable[int | None]) -> float:
    """Returns the median, of which those that never came are infinite."""
    return statistics.median(math.inf if value is None else value for value in values)


def describe(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Puts the medians and the single seeds into a table for each task."""
    blocks = []
    for name, trial in TRIALS.items():
        rows = []
        for contender in CONTENDERS:
            found = [cell["steps"] for key, cell in cells.items() if key.rpartition("/")[0] == f"{name}/{contender}"]
            columns = list(zip(*found, strict=True))
            shown = [f"{median(each):g} ({' '.join(str(step or '-') for step in sorted_(each))})" for each in columns]
            if found:
                rows.append([contender, *shown])
        if rows:
            head = [f"steps to {trial.task.metric}", *(f"{goal:g}" for goal in trial.goals)]
            blocks.append(f"{trial.task.title}\n{table(head, rows)}")
    return "\n\n".join(blocks)


def sorted_(steps: Iterable[int | None]) -> list[int | None]:
    """Sorts, those that never came last."""
    return sorted(steps, key=lambda step: math.inf if step is None else step)


def main() -> None:
    """Trains what the file doesn't have yet, writes after each, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TRIALS), help=f"of {', '.join(TRIALS)}")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 1")
    parser.add_argument("--out", type=Path, default=RESULT, help="file of the results")
    arguments = parser.parse_args()
    out: Path = arguments.out
    cells: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))["cells"] if out.exists() else {}
    for task, seed, contender in product(arguments.tasks, range(1, arguments.seeds + 1), CONTENDERS):
        name = f"{task}/{contender}/{seed}"
        if name not in cells:
            found = measured(partial(train, TRIALS[task], CONTENDERS[contender], seed))
            cells[name] = {key: found.pop(key) for key in ("steps", "last")}
            out.write_text(as_json({**found, "cells": cells}) + "\n", encoding="utf-8")
    print(describe(cells))


if __name__ == "__main__":
    main()
