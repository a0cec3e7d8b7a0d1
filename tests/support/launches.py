"""Launches of `kfdist train` in a test, and what they leave in their run directories."""

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfdist.system.files import read_ready_file
from tests.support.commands import Command, Process

Train = Callable[..., tuple[int, str]]
"""A `kfdist train` in the test's own process, the fixture `train` of tests/end_to_end: exit code and words."""

LOCAL = ("--set", "cluster.link=local")
NO_REPORT = ("--set", "run.report=false")
ONE_RANK = ("--set", "cluster.workers=1")
ONE_OWNER = ("--set", "cluster.owners=1")
OFTEN = ("--set", "preconditioner.factor_period=2", "--set", "preconditioner.inverse_period=10")
SMALL = ("--set", "model.settings.channels=8", "--set", "model.settings.hidden=32", *OFTEN)
"""A model of which steps and inversions cost little, so that there can be many of these."""
STEPS = 10_000_000
UNHURRIED = ("--set", "model.name=tests.support.small_models:unhurried_cnn", *OFTEN)
"""The same model with a rest in each step: what a test waits for, as Ray's start, has the cores meanwhile."""
ENDLESS = (*UNHURRIED, "--set", f"run.steps={STEPS}")
"""For a run that doesn't end by itself while a test looks at it."""


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Where a launch's controller serves.

    Attributes:
        control: Its gRPC address.
        metrics: URL of its metrics.
    """

    control: str
    metrics: str


def launch(directory: Path, *arguments: str, report: bool = False) -> Command:
    """Starts `kfdist train` in a run directory.

    Args:
        directory: The run's.
        *arguments: Of the command.
        report: Whether it draws its report, which takes seconds.
    """
    return Command("train", "--set", f"run.dir={directory}", *(() if report else NO_REPORT), *arguments)


def addresses(command: Command) -> Addresses:
    """Waits until a launch says where its controller serves."""
    control, _, metrics = command.wait_for_line("controller on ").partition("controller on ")[2].partition(",")
    return Addresses(control=control, metrics=metrics.partition("metrics on ")[2].strip())


def ready_file_of(process: Process) -> Mapping[str, Any]:
    """Returns what a service of a launch last wrote to the ready file that its command line names; empty if nothing."""
    (name,) = [word for word in shlex.split(process.title) if word.startswith("--ready-file=")]
    return read_ready_file(Path(name.removeprefix("--ready-file="))) or {}


def summary_of(directory: Path) -> dict[str, Any]:
    """Reads `summary.json` of a run directory."""
    return json.loads((directory / "summary.json").read_text())


def checkpoints_of(directory: Path) -> list[int]:
    """Returns the steps of the finished checkpoints in a run directory, in order."""
    names = [path.name for path in (directory / "checkpoints").glob("step-*")]
    return sorted(int(name.removeprefix("step-")) for name in names if not name.endswith(".incomplete"))
