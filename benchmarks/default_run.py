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


def timed_run(directory: Path) -> dict[str, object]:
    """Runs the default configuration once and returns the figures to report."""
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "kfdist", "train", "--set", f"run.dir={directory}"],
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
        "bytes": summary["bytes"],
        "versions": summary["versions"],
    }


def main() -> None:
    """Runs, prints and writes."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory() as scratch:
        runs = [timed_run(Path(scratch) / str(index)) for index in range(count)]
    versions = [run.pop("versions") for run in runs][0]
    walls = [float(str(run["wall_seconds"])) for run in runs]
    result = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "load_before": os.getloadavg()[0]},
        "versions": versions,
        "median_wall_seconds": statistics.median(walls),
        "runs": runs,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    for run in runs:
        shown = f"{run['wall_seconds']:>7} s wall, {run['training_seconds']:>6} s training"
        print(f"{shown}, accuracy {run['test_accuracy']:.2%}")
    print(f"median {result['median_wall_seconds']} s; written to {RESULT}")


if __name__ == "__main__":
    main()
