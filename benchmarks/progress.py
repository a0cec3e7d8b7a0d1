"""Shows in steps what settings do to training: what savings cost, and which damping a default may be.

    PYTHONPATH=. python -m benchmarks.progress {savings,damping} [TASK ...] [--seeds SEEDS]

*savings*: each task with the defaults of `rs-kfac` (rows drawn by cost, eigenpairs cut by damping, rank 220), with
either saving undone, with both undone, and with all eigenpairs of all rows, which is K-FAC without an approximation of
its own. Statistics are taken every 2 steps and inverted every 10, so that savings have something to spoil. A saving
costs nothing where its median over the seeds lies among the seeds of the exact one, or below.

*damping*: `kfdist.Preconditioner(model)` with its defaults at some dampings, with either Fisher.

Beneath is SGD with momentum 0.9 at a rate of 0.1. Everything that isn't named is equal: model, batches, seeds. Inverses
are adopted three steps late (`FixedLag(3)`), so that steps can be repeated on one machine. A goal is reached when
three measurements in a row are at it. Cells are written as they are done, and a cell that the file has isn't trained
again.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfdist
from kfdist.bench.contest_tasks import TASKS, Task
from kfdist.bench.measuring import measured
from kfdist.bench.results import as_json, table
from kfdist.bench.target_cells import IN_A_ROW
from kfdist.bench.workloads import Batch, SmallGpt, source_text

RESULTS = Path(__file__).parent / "results"
LAG, LEARNING_RATE = 3, 0.1


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How a task is trained.

    Attributes:
        task: The task.
        shown: What its metric is computed by, of outputs and targets; None: its loss.
        goals: Values of the metric, falling.
        steps: How many.
        settings: Of the preconditioner, where savings are measured.
    """

    task: Task
    shown: Callable[[Tensor, Tensor], Tensor] | None = None
    goals: Sequence[float]
    steps: int
    settings: Mapping[str, Any] = field(default_factory=dict)

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


@cache
def texts() -> tuple[Batch, Batch]:
    """Returns sequences of 64 characters of the standard library's source, and each one's next; 64 to test on."""
    text = source_text()
    windows = text[: len(text) // 65 * 65].view(-1, 65)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    train, test = windows[order[64:]], windows[order[:64]]
    return (train[:, :-1], train[:, 1:]), (test[:, :-1], test[:, 1:])


OFTEN = {"factor_period": 2, "inverse_period": 10}
CNN = TASKS["digits-cnn"]
TRIALS: Mapping[str, Trial] = {
    "run": Trial(
        task=replace(CNN, title="the digits run at a constant rate", metric="test error", evaluation_period=1),
        shown=error_rate,
        goals=(0.03, 0.02),
        steps=80,
        settings={**OFTEN, "kl_clip": 1e-2},
    ),
    "cnn": Trial(task=CNN, goals=(0.1, 0.05, 0.032), steps=150, settings=OFTEN),
    "mlp": Trial(
        task=replace(CNN, title="MLP 64-512-512-10", metric="training loss", build=perceptron, on_test=False),
        goals=(0.3, 0.1, 0.03),
        steps=150,
        settings=OFTEN,
    ),
    "autoencoder": Trial(
        task=TASKS["digits-autoencoder"], goals=(0.04, 0.03, 0.025), steps=400, settings={**OFTEN, "fisher": "mc"}
    ),
    "gpt": Trial(
        task=Task(
            title="character GPT of 3 layers, width 96, context 64, batch 16",
            metric="test loss",
            goal=2.3,
            seconds=60.0,
            batch_size=16,
            data=texts,
            build=lambda: SmallGpt(layers=3, width=96),
            loss=lambda output, target: F.cross_entropy(output.flatten(0, 1), target.flatten()),
            loss_name="cross_entropy",
            on_test=True,
        ),
        goals=(2.6, 2.4, 2.3),
        steps=150,
    ),
}

WHOLE = kfdist.Sampling(examples_fraction=1.0)
ALL_FOUND = kfdist.RsKfac(direction_error=0)
SAVINGS: Mapping[str, Mapping[str, Any]] = {
    "defaults": {},
    "all pairs found": {"method": ALL_FOUND},
    "all rows": {"sampling": WHOLE},
    "all rows, all pairs found": {"sampling": WHOLE, "method": ALL_FOUND},
    "exact": {"sampling": WHOLE, "method": kfdist.RsKfac(direction_error=0, rank=100_000)},
}
DAMPINGS: Mapping[str, Mapping[str, Any]] = {
    **{f"damping {damping:g}": {"damping": damping} for damping in (1e-3, 1e-2, 3e-2, 1e-1)},
    **{f"damping {damping:g}, mc": {"damping": damping, "fisher": "mc"} for damping in (1e-3, 1e-2, 3e-2)},
}
QUESTIONS = {
    "savings": (("run", "cnn", "mlp", "autoencoder"), SAVINGS),
    "damping": (("cnn", "autoencoder", "gpt"), DAMPINGS),
}


def steps_to(goals: Sequence[float], curve: Sequence[tuple[int, float]]) -> list[int | None]:
    """Returns the first step at which each goal was reached for as many measurements in a row as count; None: never."""
    runs = [curve[i : i + IN_A_ROW] for i in range(len(curve) - IN_A_ROW + 1)]
    return [next((run[0][0] for run in runs if all(value <= goal for _, value in run)), None) for goal in goals]


def train(trial: Trial, settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Trains once; returns "steps" to each goal and "last", the metric at the end."""
    task = trial.task
    model, batches = task.model(seed), task.batches(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    curve: list[tuple[int, float]] = []
    with kfdist.Preconditioner(
        model, lr=LEARNING_RATE, adoption=kfdist.FixedLag(LAG), seed=seed, **settings
    ) as preconditioner:
        for step in range(1, trial.steps + 1):
            inputs, targets = next(batches)
            optimizer.zero_grad()
            output = model(inputs)
            if "fisher" in settings:
                classes_second = output if output.dim() == 2 else output.mT
                preconditioner.observe(classes_second, task.loss_name)
            task.loss(output, targets).backward()
            preconditioner.step()
            optimizer.step()
            if step % task.evaluation_period == 0:
                curve.append((step, trial.value(model)))
    return {"steps": steps_to(trial.goals, curve), "last": float(f"{curve[-1][1]:.4g}")}


def median(values: Iterable[float | None]) -> float:
    """Returns the median, of which those that never came are infinite."""
    return statistics.median(math.inf if value is None else value for value in values)


def describe(cells: Mapping[str, Mapping[str, Any]], settings: Iterable[str]) -> str:
    """Puts medians and single seeds into a table for each task."""
    blocks = []
    for name, trial in TRIALS.items():
        rows = []
        for setting in settings:
            found = [cell for key, cell in cells.items() if key.rpartition("/")[0] == f"{name}/{setting}"]
            steps = zip(*(cell["steps"] for cell in found), strict=True)
            last = [cell["last"] for cell in found]
            if found:
                rows.append([setting, *map(spread, steps), f"{median(last):.3g} ({max(last):.3g})"])
        if rows:
            head = [f"steps to {trial.task.metric}", *(f"{goal:g}" for goal in trial.goals), "last (worst)"]
            blocks.append(f"{trial.task.title}\n{table(head, rows)}")
    return "\n\n".join(blocks)


def spread(steps: Iterable[int | None]) -> str:
    """Says the median and each of some numbers of steps, rising."""
    each = sorted(math.inf if step is None else step for step in steps)
    return f"{median(each):g} ({' '.join(f'{step:g}' for step in each)})".replace("inf", "-")


def main() -> None:
    """Trains what the file doesn't have yet, writes after each, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(TRIALS)}")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 1")
    arguments = parser.parse_args()
    tasks, contenders = QUESTIONS[arguments.question]
    out = RESULTS / f"progress_{arguments.question}.json"
    cells: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))["cells"] if out.exists() else {}
    for task, seed, (name, changes) in product(
        arguments.tasks or tasks, range(1, arguments.seeds + 1), contenders.items()
    ):
        trial, cell = TRIALS[task], f"{task}/{name}/{seed}"
        if cell not in cells:
            settings = {**trial.settings, **changes} if arguments.question == "savings" else changes
            found = measured(partial(train, trial, settings, seed))
            cells[cell] = {key: found.pop(key) for key in ("steps", "last")}
            out.write_text(as_json({**found, "cells": cells}) + "\n", encoding="utf-8")
    print(describe(cells, contenders))


if __name__ == "__main__":
    main()
