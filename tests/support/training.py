"""Whole training runs over ranks that are forked from a warm server: the trainer itself, without command line."""

import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kfdist.comm.communicator import Communicator
from kfdist.config import load_config
from kfdist.training.worker import train_together
from kfdist.wire.tree import unpack
from tests.support.ranks import run_ranks

SMALL = """
[run]
steps = 40
log_period = 1
[data]
name = "synthetic"
batch_size = 8
settings = { shape = [12], train_examples = 200 }
[model]
name = "mlp"
settings = { hidden = [24, 16] }
[optimizer]
name = "sgd"
schedule = "constant"
[preconditioner]
method = "rs-kfac"
settings = { rank = 6 }
factor_period = 2
inverse_period = 8
[cluster]
link = "local"
[checkpoint]
period = 0
"""
"""A run of a fraction of a second: three layers, ten classes, 40 steps."""

FIXED_LAG = ("preconditioner.adoption=fixed-lag", "preconditioner.lag=5")


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Sends this signal to one rank once the log shows that `step` is done."""

    step: int
    worker_rank: int = 0
    number: int = signal.SIGTERM


def train(
    directory: Path,
    *overrides: str,
    ranks: int,
    stop: Stop | None = None,
    prepare: Callable[[int], None] | None = None,
    recipe: str | None = None,
) -> dict[str, Any]:
    """Runs to the end or to the stop; returns the summary, with the ranks' exit codes under "codes".

    Args:
        directory: The run directory.
        *overrides: On top of `SMALL`.
        ranks: How many.
        stop: When to stop it from outside.
        prepare: Called on each rank, with its number, before training; importable.
        recipe: The name of one, in the place of `SMALL`.
    """
    codes = run_ranks(ranks, _train_rank, str(directory), overrides, stop, prepare, recipe)
    summary = json.loads((directory / "summary.json").read_text())
    return {**summary, "codes": codes}


def checkpoint_states(directory: Path) -> list[Any]:
    """The ranks' own states in the only or newest checkpoint."""
    newest = max((directory / "checkpoints").iterdir())
    return [unpack(path.read_bytes()) for path in sorted(newest.glob("rank-*.safetensors"))]


def parameters(directory: Path) -> torch.Tensor:
    """All parameters in the newest checkpoint, flat."""
    newest = max((directory / "checkpoints").iterdir())
    shared = unpack((newest / "shared.safetensors").read_bytes())
    return torch.cat([tensor.flatten() for tensor in shared["parameters"].values()])


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind in metrics.jsonl."""
    whole = (directory / "metrics.jsonl").read_text().rpartition("\n")[0]  # the last line may be half written
    lines = [json.loads(line) for line in whole.splitlines()]
    return [line for line in lines if line["event"] == kind]


def _train_rank(
    communicator: Communicator,
    directory: str,
    overrides: Sequence[str],
    stop: Stop | None,
    prepare: Callable[[int], None] | None,
    recipe: str | None,
) -> int:
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(SMALL)
        file.flush()
        config = load_config(Path(recipe or file.name), overrides=[*overrides, f"run.dir={directory}"], environment={})
    if prepare is not None:
        prepare(communicator.rank)
    if stop is not None and stop.worker_rank == communicator.rank:
        threading.Thread(target=_send, args=(Path(directory), stop), daemon=True).start()
    return train_together(config, communicator, torch.device("cpu")).code


def _send(directory: Path, stop: Stop) -> None:
    while True:
        time.sleep(0.001)
        if (
            (directory / "metrics.jsonl").exists()
            and (done := events(directory, "step"))
            and done[-1]["step"] >= stop.step
        ):
            os.kill(os.getpid(), stop.number)
            return
