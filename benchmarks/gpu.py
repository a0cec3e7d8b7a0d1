"""Measures on a CUDA device what a step with kfdist costs, of three models, and how long inversions take by method.

    python -m benchmarks.gpu [resnet50|gpt|vit|inversions ...] [--seconds 44] [--out benchmarks/results/gpu.json]

resnet50: as the recipe imagenet-resnet50 has it, SGD alone and behind `rs-kfac`, inverses by an owner on CPUs, then by
one on the same GPU. gpt, vit: AdamW and `kfdist.Optimizer`; SGD alone and behind `rs-kfac`. All in bfloat16 autocast,
periods 10 and 100. For each kfdist's parts, at which share of the card's own rate. inversions: ResNet-50's factors by
every method on the card. `--tiny` runs the same code on a CPU in seconds.

Several parts can be measured one after another, each adds to the file, which is written after each measurement, so that
nothing is lost where time runs out. A measurement that fails is told, and the others go on, as long as the device
answers; the exit code is then 1.
"""

import argparse
import gc
import json
import os
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_inversions import inversions, served_gpus
from benchmarks.gpu_rates import product_rates, shares
from benchmarks.gpu_steps import FACTOR_PERIOD, INVERSE_PERIOD, by_sgd, compared, steps, variants_of
from benchmarks.gpu_tasks import LARGE, TINY, Task
from kfdist.curvature.inverters import INVERTERS
from kfdist.linalg.arithmetic import product_precision
from kfdist.system.files import replace_file
from kfdist.system.provenance import processor_field, versions

RESULT = Path(__file__).parent / "results" / "gpu.json"
INVERSIONS = "inversions"
PARTS = (*LARGE, INVERSIONS)
THREADS = 4
"""Of the process that trains and of an owner, as the recipe has them."""

_SGD_SECONDS = 3.0
"""Of steps that inversions are compared with, where the file has none."""

_CHEAP = ("rs-kfac", "sre-kfac", "kfac", "seng", "eva", "cg-fac", "ekfac-adam", "b-kfac", "b-r-kfac", "b-kfac-c")
"""Methods whose inversions come first."""


class Report:
    """What was measured so far, as the file has it.

    Args:
        path: The file; what another part left in it stays.
        device: Where it is measured.
        facts: What is told of each part beside its measurements.

    Attributes:
        content: All of it: by part, kind and name.
        failures: The measurements of this process that failed.
        lost: Why nothing more can be measured; empty while the device answers.
    """

    def __init__(self, path: Path, device: torch.device, facts: Mapping[str, Any]) -> None:
        self._path = path
        self._device = device
        self._facts = dict(facts)
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.content: dict[str, Any] = {name: before[name] for name in PARTS if name in before}
        self.failures: list[str] = []
        self.lost = ""

    def begin(self, part: str, facts: Mapping[str, Any]) -> None:
        """Begins a part afresh."""
        self.content[part] = {**self._facts, **facts}

    def found(self, part: str, kind: str) -> dict[str, Any]:
        """Returns the measurements of a kind."""
        return self.content.get(part, {}).get(kind, {})

    def add(self, part: str, kind: str, name: str, measured: Callable[[], dict[str, Any]]) -> None:
        """Measures, and writes the file; what goes wrong is what it says of this measurement."""
        found: dict[str, Any] = {"failed": self.lost}
        if not self.lost:
            try:
                found = measured()
            except Exception as error:
                traceback.print_exc()
                found = {"failed": f"{type(error).__name__}: {error}"}
            self.lost = self._left_over()
        if "failed" in found:
            self.failures.append(f"{part}, {kind}, {name}")
        self.put(part, kind, name, found)

    def put(self, part: str, kind: str, name: str, found: Mapping[str, Any]) -> None:
        """Takes a measurement, and writes the file anew."""
        self.content.setdefault(part, {}).setdefault(kind, {})[name] = dict(found)
        print(f"{part}, {kind}, {name}: {dict(found)}", flush=True)
        replace_file(self._path, (json.dumps(self.content, indent=2) + "\n").encode())

    def _left_over(self) -> str:
        """Frees what the last one held; says whether the device, after an error of its own, no longer answers."""
        gc.collect()
        if self._device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                return f"the device doesn't answer any more: {error}"
        return ""


def measure_steps(part: str, seconds: float, report: Report, device: torch.device, *, tiny: bool) -> None:
    """Measures the steps of one model within a budget, in which starts and first inverses aren't.

    Args:
        part: The model.
        seconds: How long to make steps, all variants together.
        report: Takes what is found.
        device: Where.
        tiny: Whether the model is a small one.
    """
    task = Task((TINY if tiny else LARGE)[part], device)
    periods = {"factor_period": FACTOR_PERIOD, "inverse_period": INVERSE_PERIOD}
    report.begin(part, {"model": task.training.title, **periods, "products_round_to": product_precision(device)})
    size = {"size": 64} if tiny else {}
    report.add(part, "card", "tflops of a product", lambda: product_rates(device, **size))
    variants = variants_of(part, task, threads=THREADS, tiny=tiny)
    share = seconds / sum(each.weight for each in variants)
    for each in variants:
        report.add(part, "steps", each.name, partial(steps, task, each, share * each.weight))
        found = report.found(part, "steps")
        beside = compared(variants, found)
        if each.name in beside:
            report.put(part, "compared", each.name, beside[each.name])
        products = report.found(part, "card")["tflops of a product"]
        if "parts" in found[each.name] and "failed" not in products:
            report.put(part, "share of the card's rate", each.name, shares(found[each.name]["parts"], products))


def measure_inversions(seconds: float, report: Report, device: torch.device, *, tiny: bool) -> None:
    """Measures the inversions of ResNet-50's factors by each method on the device, cheap methods first.

    Args:
        seconds: About how long.
        report: Takes what is found.
        device: Where.
        tiny: Whether the model is a small one.
    """
    task = Task((TINY if tiny else LARGE)["resnet50"], device)
    report.begin(INVERSIONS, {"model": task.training.title})
    known = report.found("resnet50", "steps").get("sgd", {})
    if "mean_ms" not in known:
        report.add(INVERSIONS, "steps", "sgd", lambda: steps(task, by_sgd(task), min(_SGD_SECONDS, seconds)))
        known = report.found(INVERSIONS, "steps")["sgd"]
    ends = time.perf_counter() + seconds
    for method in dict.fromkeys([*_CHEAP, *INVERTERS]):
        if time.perf_counter() > ends:
            report.put(INVERSIONS, "methods", method, {"skipped": "no time left"})
            continue
        report.add(INVERSIONS, "methods", method, partial(inversions, task, method, device.type))
        took = report.found(INVERSIONS, "methods")[method].get("seconds")
        if took and "mean_ms" in known:
            report.put(INVERSIONS, "one owner on the card", method, served_gpus(took, known["mean_ms"]))


def hardware(device: torch.device) -> Mapping[str, Any]:
    """Describes what it ran on."""
    found: dict[str, Any] = {"cpu": processor_field("model name"), "cores": os.cpu_count(), "device": device.type}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def main(words: list[str] | None = None) -> None:
    """Measures, writes and prints; ends with 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; all if none")
    parser.add_argument("--seconds", type=float, default=44.0, help="of steps, or inversions, a part; starts beside it")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--tiny", action="store_true", help="small networks on a CPU, to try the benchmark itself")
    given = parser.parse_args(words)
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if not given.tiny and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --tiny tries the benchmark on a CPU")
    device = torch.device("cpu" if given.tiny else "cuda")
    torch.set_num_threads(THREADS)
    facts = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(device),
        "versions": versions(),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    report = Report(given.out, device, facts)
    for part in given.parts or PARTS:
        if part == INVERSIONS:
            measure_inversions(given.seconds, report, device, tiny=given.tiny)
        else:
            measure_steps(part, given.seconds, report, device, tiny=given.tiny)
    if report.failures:
        raise SystemExit("failed: " + "; ".join(report.failures))


if __name__ == "__main__":
    main()
