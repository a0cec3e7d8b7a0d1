"""Shows what the thread that inverts costs the one that trains, where both have two cores; each in its own process.

    PYTHONPATH=. python -m benchmarks.inverting_thread [OUT.json]

For three tasks of `kfdist bench target`: the wall time of a step of AdamW and of `kfdist.Optimizer` with its defaults,
with torch's two threads. "as it is" is LocalLink, which inverts on one thread; "two threads" has it invert on as many
as torch trains on, which is what a thread does that says nothing. The variants take turns. Writes
benchmarks/results/inverting_thread.json unless told otherwise.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from kfdist.bench.contest_rivals import RIVALS
from kfdist.bench.contest_tasks import TASKS
from kfdist.bench.measuring import measured
from kfdist.links import local

RESULT = Path(__file__).parent / "results" / "inverting_thread.json"
WORK = {"digits-autoencoder": 300, "digits-cnn": 120, "character-gpt": 40}
"""Steps of each task."""

ROUNDS, WARM = 3, 20
VARIANTS = "adamw", "two threads", "as it is"


def steps(task: str, variant: str) -> dict[str, float]:
    """Trains, and returns milliseconds a step: the mean and the median."""
    if variant == "two threads":
        local.set_own_threads = lambda count: None
    torch.set_num_threads(2)
    work, rival = TASKS[task], RIVALS["adamw" if variant == "adamw" else "optimizer"]
    model, batches, seconds = work.model(0), work.batches(0), []
    with rival.training(work, model, 0.003) as step:
        for _ in range(WARM + WORK[task]):
            batch = next(batches)
            begun = time.perf_counter()
            step(batch)
            seconds.append(time.perf_counter() - begun)
    return {"mean": 1e3 * statistics.mean(seconds[WARM:]), "median": 1e3 * statistics.median(seconds[WARM:])}


def measure() -> dict[str, Any]:
    """Measures every variant in processes of their own; medians over the rounds."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for task in WORK:
        rounds: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
        for _ in range(ROUNDS):
            for variant in VARIANTS:
                command = [sys.executable, "-m", "benchmarks.inverting_thread", "--steps", task, variant]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rounds[variant].append(json.loads(done.stdout))
        found[task] = {
            variant: {key: round(statistics.median(each[key] for each in rows), 2) for key in ("mean", "median")}
            for variant, rows in rounds.items()
        }
        print(task, found[task], flush=True)
    return {"milliseconds": found, "threads": 2, "rounds": ROUNDS, "cores": sorted(os.sched_getaffinity(0))}


def main() -> None:
    """Measures, and writes the result."""
    if sys.argv[1:2] == ["--steps"]:
        print(json.dumps(steps(*sys.argv[2:4])))
        return
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULT
    out.write_text(json.dumps(measured(measure), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
