"""Shows how long `kfdist train` without arguments takes, from start to exit, with all its processes.

    python benchmarks/default_run.py [RUNS]

Prints wall-clock seconds of each run and their median, and writes them with step seconds, staleness, accuracy, hardware
and versions to benchmarks/results/default_run.json. The run should take less than 60 s on two cores.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "default_run.json"


WAYS = {"default": (), "rs-kfac under SGD, the default before": ("optimizer.name=sgd",)}


def timed_run(directory: Path, *settings: str) -> dict[str, object]:
    """Runs the default configuration with these settings once and returns the figures to report."""
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "kfdist", "train"]
        + [part for each in (f"run.dir={directory}", *settings) for part in ("--set", each)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - begun
    summary = json.loads((directory / "summary.json").read_text())
    return {
        "wall_seconds": round(seconds, 2),
        "training_seconds": round(summary["seconds"], 2),
        "step_seconds": summary["step_seconds"],
        "staleness_steps": summary["staleness_steps"],
        "test_accuracy": summary["metrics"]["test_accuracy"],
        "test_loss": summary["metrics"]["test_loss"],
        "bytes": summary["bytes"],
        "versions": summary["versions"],
    }


def main() -> None:
    """Runs the ways in turn, with a seed after the other, prints and writes."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    load = os.getloadavg()[0]
    runs: dict[str, list[dict[str, object]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(1, count + 1):
            for number, (way, settings) in enumerate(WAYS.items()):
                directory = Path(scratch) / f"{seed}-{number}"
                runs[way].append({"seed": seed, **timed_run(directory, f"run.seed={seed}", *settings)})
    versions = [run.pop("versions") for each in runs.values() for run in each][0]
    walls = {way: statistics.median(float(str(run["wall_seconds"])) for run in each) for way, each in runs.items()}
    result = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "load_before": load},
        "versions": versions,
        "median_wall_seconds": walls,
        "runs": runs,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    for way, each in runs.items():
        print(f"{way}: median {walls[way]} s")
        for run in each:
            shown = f"{run['wall_seconds']:>7} s wall, {run['training_seconds']:>6} s training"
            print(f"  seed {run['seed']}: {shown}, accuracy {run['test_accuracy']:.2%}, loss {run['test_loss']:.4f}")
    print(f"written to {RESULT}")


if __name__ == "__main__":
    main()
