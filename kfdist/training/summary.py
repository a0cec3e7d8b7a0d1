"""`summary.json`: what a run did, in numbers, for users and programs that come afterwards."""

import hashlib
import json
import math
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kfdist.system.files import replace_file
from kfdist.system.provenance import versions
from kfdist.training.run_state import Training

_FORBIDDEN = ("ray", "grpc")


def modules_clean() -> bool:
    """Tells whether this process has stayed free of ray and grpc, as a rank must to outlive Ray and to fork safely."""
    return not any(module in sys.modules for module in _FORBIDDEN)


def parameter_sha256(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Returns a digest of the parameters' names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters, key=lambda item: item[0]):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        # Bytes and not numbers: also for types that numpy doesn't have.
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def step_statistics(seconds: Sequence[float]) -> dict[str, float | None]:
    """Returns mean, median and 99th percentile (nearest rank) of the steps' seconds; None without steps."""
    if not seconds:
        return {"mean": None, "p50": None, "p99": None}
    ordered = sorted(seconds)

    def quantile(q: float) -> float:
        return ordered[max(0, math.ceil(q * len(ordered)) - 1)]

    return {"mean": sum(ordered) / len(ordered), "p50": quantile(0.5), "p99": quantile(0.99)}


def gather_totals(training: Training, steps_done: int) -> dict[str, Any]:
    """Adds up what the ranks counted in this start. All ranks must call it, and get the same."""
    counters = training.preconditioner.counters()
    gradients = training.reducer.bytes_per_step * steps_done if training.communicator.world_size > 1 else 0
    own = {
        "counters": counters,
        "bytes": {"gradients": gradients, **counters["bytes"]},
        "parameter_sha256": parameter_sha256(training.model.named_parameters()),
        "modules_clean": modules_clean(),
    }
    ranks = training.communicator.all_gather_json(own)
    # Results come to the rank that asked for them, so completed ones add up; failures are adopted by all ranks alike.
    by_method = _sum(rank["counters"]["inversions"]["by_method"] for rank in ranks)
    return {
        "staleness_steps": {"p50": None, "max": None, **counters["staleness_steps"]},
        "inversions": {
            "completed": sum(by_method.values()),
            "failed": counters["inversions"]["failed"],
            "by_method": by_method,
        },
        "adoptions": counters.get("adoptions", 0),
        "fallbacks": counters.get("fallbacks", {}),
        "failures": counters.get("failures", {}),
        "resubmissions": _sum(rank["counters"].get("resubmissions", {}) for rank in ranks),
        "courier_restarts": sum(rank["counters"].get("courier_restarts", 0) for rank in ranks),
        "samples_lost": sum(rank["counters"].get("samples_lost", 0) for rank in ranks),
        "nonfinite_drops": sum(rank["counters"].get("nonfinite_drops", 0) for rank in ranks),
        "rank_modules_clean": all(rank["modules_clean"] for rank in ranks),
        "bytes": _sum(rank["bytes"] for rank in ranks),
        "parameter_sha256": [rank["parameter_sha256"] for rank in ranks],
    }


def summarise(
    training: Training,
    totals: Mapping[str, Any],
    *,
    status: str,
    progress: Mapping[str, Any],
    metrics: Mapping[str, float | None],
    step_seconds: array,
) -> dict[str, Any]:
    """Puts a summary together.

    Args:
        training: What was trained with.
        totals: What `gather_totals` returned.
        status: "finished" or "stopped".
        progress: How far the run has come: steps, data_epochs, seconds, start.
        metrics: Results on the data.
        step_seconds: Seconds of each step of this start.
    """
    return {
        "status": status,
        "run": training.config.run.name,
        **progress,
        "metrics": dict(metrics),
        "step_seconds": step_statistics(step_seconds),
        **totals,
        # Those who run the pool know and may overwrite it: a rank never talks to Ray.
        "owner_restarts": 0,
        "world_size": training.communicator.world_size,
        "device": str(training.device),
        "versions": versions(),
    }


def write_summary(directory: Path, summary: Mapping[str, Any]) -> None:
    """Replaces the run's summary."""
    replace_file(directory / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)
