"""Shows how long `kfdist train` takes from its start to the end of its first step, and what importing costs.

    python benchmarks/start_up.py [RUNS]

Prints the seconds of the default run at which its stages are reached, the CPU seconds that each kind of process has
used until the first step, and seconds of `import torch`, of importing what a training script uses of kfdist, and of
`kfdist --help`, each the median of RUNS. Writes them, with hardware and versions, to benchmarks/results/start_up.json.
On two cores the first step should end within 12 s, an import of kfdist take less than 1.1 times that of torch, and
`kfdist --help` less than 0.5 s.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "start_up.json"
SAID = {"controller on": "controller serves", "training on": "ranks train", "pool with": "owners serve"}
"""What the launch says on reaching a stage."""
ROLES = {
    "kfdist train": "launcher",
    "kfdist serve": "controller",
    "kfdist pool": "pool",
    "kfdist worker": "ranks",
    "kfdist.links.courier": "couriers",
    "ray::": "owners",
    "default_worker.py": "owners",
    "kfdist.owner.child": "inversion processes",
}
"""Processes by what is in their command lines; whatever else a launch starts is Ray's."""
_TICKS = os.sysconf("SC_CLK_TCK")


def launch(directory: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Runs one step; returns when each stage was reached, and CPU seconds by kind of process at the first step."""
    settings = [f"run.dir={directory}", "run.steps=1", "run.log_period=1", "checkpoint.keep=1"]
    command = [sys.executable, "-m", "kfdist", "train", *(part for each in settings for part in ("--set", each))]
    output, cpu = directory.with_suffix(".log"), {}
    begun, stages = time.time(), {}
    with output.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        while process.poll() is None:
            said = output.read_text()
            for words, stage in SAID.items():
                if words in said:
                    stages.setdefault(stage, time.time() - begun)
            if "first step" not in stages:
                cpu |= _cpu_of_descendants(process.pid)
                if ended := _first_step(directory):
                    stages["first step"] = ended - begun
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(output.read_text())
    stages["exit"] = time.time() - begun
    used: Counter[str] = Counter()
    for role, seconds in cpu.values():
        used[role] += seconds
    return stages, dict(used)


def _first_step(directory: Path) -> float | None:
    try:
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        return next((event["time"] for event in map(json.loads, lines) if event["event"] == "step"), None)
    except (FileNotFoundError, ValueError):  # not there yet, or half written
        return None


def _cpu_of_descendants(root: int) -> dict[int, tuple[str, float]]:
    """Maps the ids of a process and all that descend from it to their kind and CPU seconds."""
    parents, seconds = {}, {}
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        parents[pid], seconds[pid] = int(fields[1]), (int(fields[11]) + int(fields[12])) / _TICKS
    found = {}
    for pid in parents:
        ancestor = pid
        while ancestor in parents and ancestor != root:
            ancestor = parents[ancestor]
        if ancestor == root:
            found[pid] = _role(pid), seconds[pid]
    return found


def _role(pid: int) -> str:
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        line = ""
    return next((role for words, role in ROLES.items() if words in line), "Ray")


def seconds_of(*arguments: str) -> float:
    """Returns the seconds that a Python process takes."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def main() -> None:
    """Measures, prints and writes."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled
    commands = {
        "import torch": ("-c", "import torch"),
        "import kfdist": ("-c", "import kfdist"),
        "kfdist.Preconditioner": ("-c", "import kfdist; kfdist.Preconditioner"),
        "kfdist --help": ("-m", "kfdist", "--help"),
    }
    with tempfile.TemporaryDirectory() as scratch:
        # In turns, so that whatever else the machine does meets all of them.
        launches = [launch(Path(scratch) / str(index)) for index in range(count)]
        taken = [{name: seconds_of(*command) for name, command in commands.items()} for _ in range(count + 1)][1:]
    result = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "load_before": os.getloadavg()[0]},
        "python": platform.python_version(),
        "stages": _medians([stages for stages, _ in launches]),
        "cpu_until_first_step": _medians([used for _, used in launches]),
        "seconds": _medians(taken),
    }
    result["ratio_of_imports"] = round(
        result["seconds"]["kfdist.Preconditioner"] / result["seconds"]["import torch"], 3
    )
    for part in ("stages", "cpu_until_first_step", "seconds"):
        print(part.replace("_", " "))
        for name, seconds in sorted(result[part].items(), key=lambda item: item[1]):
            print(f"  {name:<24}{seconds:8.2f} s")
    print(f"CPU until the first step: {sum(result['cpu_until_first_step'].values()):.1f} s; ", end="")
    print(f"kfdist.Preconditioner over import torch: {result['ratio_of_imports']}")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


def _medians(measured: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for each in measured for name in each)
    return {name: round(statistics.median(each.get(name, 0.0) for each in measured), 3) for name in names}


if __name__ == "__main__":
    main()
