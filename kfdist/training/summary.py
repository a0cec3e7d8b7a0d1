"""`summary.json`: what a run did, in numbers, for users and programs that come afterwards."""

import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kfdist.system.files import replace_file
from kfdist.system.provenance import versions
from kfdist.training.run_state import Training
from kfdist.training.target import target_summary
from kfdist.training.trainer import Trainer

_FORBIDDEN = ("ray", "grpc")
_ADDED_UP = ("courier_restarts", "samples_lost", "nonfinite_drops")


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


def summarise(training: Training, trainer: Trainer, *, start: int, stopped: str) -> dict[str, Any]:
    """Puts the summary of an ended run together. All ranks must call it, and get the same.

    Args:
        training: What was trained with.
        trainer: What trained.
        start: This start's number.
        stopped: Why the run stopped before its last step; empty if it is finished.
    """
    standing = trainer.standing
    return {
        "status": "stopped" if stopped else "finished",
        "run": training.config.run.name,
        "steps": standing.step,
        "data_epochs": standing.position.epoch,
        "seconds": standing.seconds,
        "start": start,
        "stop_reason": stopped,
        "checkpoint_faults": trainer.checkpoint_faults,
        "unsaved_steps": trainer.unsaved_steps,
        "unreadable": trainer.unreadable.summary(),
        "time_to_target": target_summary(training.config.run.target_accuracy, standing.reached),
        "metrics": dict(trainer.metrics),
        "noise_scale": training.preconditioner.noise_scale(),
        "step_seconds": step_statistics(trainer.step_seconds),
        "input_seconds": step_statistics(trainer.input_seconds),
        **_gather_totals(training, len(trainer.step_seconds)),
        # Those who run the pool know and may overwrite it: a rank never talks to Ray.
        "owner_restarts": 0,
        "world_size": training.communicator.world_size,
        "device": str(training.device),
        "versions": versions(),
    }


def _gather_totals(training: Training, steps_done: int) -> dict[str, Any]:
    """Adds up what the ranks counted in this start. All ranks must call it, and get the same."""
    counters = training.preconditioner.counters()
    gradients = training.reducer.bytes_per_step * steps_done if training.communicator.world_size > 1 else 0
    ranks = training.communicator.all_gather_json(
        {
            **counters,
            "bytes": {"gradients": gradients, **counters["bytes"]},
            "parameter_sha256": parameter_sha256(training.model.named_parameters()),
            "modules_clean": modules_clean(),
        }
    )
    # Results come to the rank that asked for them, so completed ones add up; failures are adopted by all ranks alike.
    by_method = _sum(rank["inversions"]["by_method"] for rank in ranks)
    return {
        "staleness_steps": {"p50": None, "max": None, **counters["staleness_steps"]},
        "inversions": {
            "completed": sum(by_method.values()),
            "failed": counters["inversions"]["failed"],
            "by_method": by_method,
        },
        **{name: counters[name] for name in ("adoptions", "fallbacks", "failures")},
        "resubmissions": _sum(rank["resubmissions"] for rank in ranks),
        **{name: sum(rank[name] for rank in ranks) for name in _ADDED_UP},
        "rank_modules_clean": all(rank["modules_clean"] for rank in ranks),
        "bytes": _sum(rank["bytes"] for rank in ranks),
        "parameter_sha256": [rank["parameter_sha256"] for rank in ranks],
    }


def write_summary(directory: Path, summary: Mapping[str, Any]) -> None:
    """Replaces the run's summary. What JSON has no number for, such as the test loss of a diverged model, is null."""
    known = json.loads(json.dumps(summary), parse_constant=lambda _: None)
    replace_file(directory / "summary.json", (json.dumps(known, indent=2, allow_nan=False) + "\n").encode())


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)
