"""The run directory: made when everything else is known to be right, held by one trainer at a time.

Where nodes share no directory, each has its own copy of it, of which all of the following holds.

RUN/config.toml        the resolved configuration of the last start
RUN/lock               held with flock by the trainer; its text says who that is
RUN/epochs/00001.toml  one file per start, made with O_EXCL: the epoch's number and its configuration
RUN/costs.json         what inversions cost at the first start, where a method is chosen by it
RUN/metrics.jsonl  RUN/history.jsonl  RUN/summary.json  RUN/checkpoints/
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Self

from kfdist.config import Config, to_toml
from kfdist.curvature.auto import MeasuredCosts
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.system.files import lock_holder, replace_file, write_file
from kfdist.system.run_summary import read_summary, unsaved

HARMLESS = ("run.dir", "run.steps", "run.epochs", "run.log_period", "run.eval_period", "run.accept_changes") + (
    "run.eval_epochs",
    "run.target_accuracy",
    "run.stop_at_target",
    "run.trackers",
    "run.report",
    "run.device",
    "cluster.workers",
    "cluster.owners",
    "cluster.owner_address",
    "cluster.owner_ports",
    "cluster.owner_strategy",
    "cluster.bundle.",
    "cluster.ray",
    "cluster.assignment",
    "cluster.link",
    "cluster.job_deadline_seconds",
    "cluster.group_timeout_seconds",
    "control.",
    "security.",
    "checkpoint.",
    "data.loader_processes",
    "data.corrupt_limit",
    "preconditioner.wait_limit_seconds",
)
"""Keys, and sections ending in a dot, that may change between two starts of a run: they say how long, where, and on how
many processes it runs, not what it computes. (The number of ranks does change the size of a step's batch; the thread
count changes the last bits, so it isn't here.)"""


_COSTS = "costs.json"
"""What inversions cost, in a run's directory; only where `auto` chooses by it."""


def inspect_run(config: Config) -> str:
    """Checks that a run can be started here, changing nothing; a launcher calls this before it starts any process.

    Returns:
        Why there is nothing left to do under this configuration; empty if there is, as for a run that never started.

    Raises:
        ConfigError: The directory isn't a run's, or its run was started with another configuration.
        EnvironmentFault: Another trainer holds it, or it can't be read.
    """
    directory = config.run.directory
    try:
        if directory.exists() and not directory.is_dir():
            raise ConfigError(f"is {str(directory)!r}, which is a file; give a directory", path="run.dir")
        # What others put into the directory (a database, logs) doesn't make it a run's.
        if not (directory / "config.toml").exists():
            return ""
        _refuse_drift(config)
        holder = lock_holder(directory / "lock")
        summary = read_summary(directory)
    except OSError as error:
        raise EnvironmentFault(f"can't read the run directory {directory}: {error}; check owner and mode") from error
    if holder is not None:
        raise _locked(directory, holder)
    return _finished(config, summary)


def read_costs(directory: Path) -> MeasuredCosts | None:
    """Returns what inversions cost where the run in `directory` began, by which "auto" chose; None where none is kept.

    Raises:
        EnvironmentFault: It can't be read.
    """
    file = directory / _COSTS
    try:
        return MeasuredCosts.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):  # what the directory can't be is for those to say that make it
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise EnvironmentFault(
            f"can't read {file}: {error}; check owner and mode, or remove it to measure anew, which may choose other "
            "methods than those of the run's checkpoints"
        ) from error


class RunDirectory:
    """A run directory that this process holds until `close` or its end.

    Attributes:
        path: Where it is.
        last_epoch: The number of the newest start that was made in it, 0 if there was none.
    """

    def __init__(self, path: Path, lock: BinaryIO, *, fresh: bool) -> None:
        self.path = path
        self.last_epoch = 0
        self._lock = lock
        self._fresh = fresh
        self._epoch: int | None = None

    @classmethod
    def open(cls, config: Config) -> Self:
        """Makes the directory if need be and locks it.

        Only one process of a run calls this (the leader of each copy), when nothing else can go wrong with the
        configuration any more.

        Raises:
            ConfigError: As for `inspect_run`.
            EnvironmentFault: Another trainer holds it, or it can't be made. A new directory is removed again.
        """
        inspect_run(config)
        path = config.run.directory
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = _lock(path)
        except OSError as error:
            raise EnvironmentFault(f"can't make the run directory {path}: {error}; choose another run.dir") from error
        opened = cls(path, lock, fresh=not (path / "config.toml").exists())
        try:
            # Between the first look and the lock another trainer may have been here.
            _refuse_drift(config)
            opened.last_epoch = _last_epoch(path)
        except BaseException:
            opened.abandon()
            raise
        return opened

    def begin(self, epoch: int, config: Config, costs: MeasuredCosts | None = None) -> None:
        """Takes a number for this start; a new directory gets its `config.toml`, another keeps the last start's.

        Args:
            epoch: Higher than that of any start before, in any copy of the directory.
            config: The configuration.
            costs: What inversions cost, to be kept: a resumed run must choose by it, too.

        Raises:
            EnvironmentFault: Another trainer has the number, or nothing can be written.
        """
        try:
            _take_epoch(self.path / "epochs", epoch, config)
            self._epoch = epoch
            if self._fresh:
                self._write_configuration(config)
            if costs is not None and not (self.path / _COSTS).exists():
                replace_file(self.path / _COSTS, json.dumps(costs.to_json()).encode())
        except OSError as error:
            raise self._unwritable(error) from error

    def take_over(self, config: Config) -> None:
        """Writes `config.toml`, once the start has taken up the run's state: one that can't leaves it as it was.

        Raises:
            EnvironmentFault: It can't be written.
        """
        try:
            self._write_configuration(config)
        except OSError as error:
            raise self._unwritable(error) from error

    def _write_configuration(self, config: Config) -> None:
        replace_file(self.path / "config.toml", _as_saved(config).encode())

    def _unwritable(self, error: OSError) -> EnvironmentFault:
        return EnvironmentFault(f"can't write to {self.path}: {error}; make room, or choose another run.dir")

    def check_current(self) -> None:
        """Checks that no later start has taken the directory over.

        As happens on a file system that flock doesn't reach, when nodes take this process for dead that can't see it.

        Raises:
            EnvironmentFault: One has; nothing may be written any more.
        """
        if self._epoch is not None and (newest := _last_epoch(self.path)) > self._epoch:
            raise EnvironmentFault(
                f"start {newest} of the run has taken over {self.path}; this one, {self._epoch}, may not write to it "
                "any more and ends"
            )

    def abandon(self) -> None:
        """Lets go of the directory, and removes it if this start made it and nobody else put anything in.

        For starts that fail before the first step: no half-made run stays behind.
        """
        if self._fresh:
            for name in ("config.toml", "metrics.jsonl", "history.jsonl", "summary.json", "lock", _COSTS):
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.path / "epochs", ignore_errors=True)
            for directory in (self.path / "checkpoints", self.path):
                with contextlib.suppress(OSError):
                    directory.rmdir()
        self.close()

    def close(self) -> None:
        """Lets go of the directory."""
        self._lock.close()


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested tables to dotted keys."""
    result: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            result.update(flat(value, f"{prefix}{key}."))
        else:
            result[prefix + key] = value
    return result


def _refuse_drift(config: Config) -> None:
    saved = config.run.directory / "config.toml"
    if not saved.exists():
        return
    try:
        old = flat(tomllib.loads(saved.read_text(encoding="utf-8-sig")))  # an editor may have put a mark before it
    except ValueError as error:
        raise ConfigError(
            f"{saved} can't be read ({error}); restore it, or choose another run.dir", path="run.dir"
        ) from None
    new = flat(tomllib.loads(_as_saved(config)))
    # A key that the version which saved it didn't have yet: the run was computed with what is the default now.
    # (Settings have no default of their own: they go with the method, the model or the data that has them.)
    defaults = flat(tomllib.loads(to_toml(Config())))
    old = {key: defaults[key] for key in new.keys() & defaults.keys() if ".settings." not in key} | old
    lines = []
    for key in sorted(old.keys() | new.keys()):
        harmless = any(key == name or (name[-1] == "." and key.startswith(name)) for name in HARMLESS)
        if not harmless and old.get(key) != new.get(key):
            lines.extend(f"  {sign} {key} = {side[key]!r}" for sign, side in (("-", old), ("+", new)) if key in side)
    if lines and not config.run.accept_changes:
        difference = "\n".join(lines)
        raise ConfigError(
            f"{config.run.directory} holds a run with another configuration:\n{difference}\n"
            "undo the change, choose another run.dir for a new run, or take this one over with "
            "--set run.accept_changes=true",
            path="run.dir",
        )


def _finished(config: Config, summary: Mapping[str, Any]) -> str:
    if summary.get("status") != "finished" or unsaved(summary):
        return ""  # or its last checkpoint is lacking: a start makes the steps since the newest anew
    for key, done in (("steps", summary.get("steps")), ("epochs", summary.get("data_epochs"))):
        wanted = getattr(config.run, key)
        if wanted is not None and isinstance(done, int) and done >= wanted:
            return (
                f"the run in {config.run.directory} is finished: {done} {key} are done and run.{key} is {wanted}; "
                f"raise run.{key} to train on, or choose another run.dir for a new run"
            )
    return ""


def _as_saved(config: Config) -> str:
    # The permission to change is given for one start; a saved file must not give it for ever.
    run = config.run.model_copy(update={"accept_changes": False})
    control = config.control.model_copy(update={"database": _absolute(config.control.database)})
    secrets = {name: _absolute(getattr(config.security, name)) for name in ("certificates", "token_file")}
    security = config.security.model_copy(update=secrets)
    return to_toml(config.model_copy(update={"run": run, "control": control, "security": security}))


def _absolute(path: str | None) -> str | None:
    """Returns where a file is whatever the working directory: commands read the saved configuration in any."""
    if path is None or path.startswith("~"):  # the home of whoever reads it
        return path
    try:
        absolute = os.path.abspath(path)
        absolute.encode()
    except (OSError, UnicodeEncodeError):  # the working directory was removed, or isn't named in UTF-8, as TOML is
        return path
    return absolute


def _lock(path: Path) -> BinaryIO:
    file = (path / "lock").open("a+b")
    # `inspect_run`, which only looks, holds the lock too, but for an instant.
    for attempt in range(10):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.02 * attempt)
    else:
        holder = (path / "lock").read_text(encoding="utf-8", errors="replace").strip()
        file.close()
        raise _locked(path, holder)
    file.truncate(0)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    file.write(f"process {os.getpid()} on {socket.gethostname()}, started {started}\n".encode())
    file.flush()
    return file


def _locked(path: Path, holder: str) -> EnvironmentFault:
    who = holder or "another process"
    return EnvironmentFault(f"the run directory {path} is in use by {who}; stop that one, or choose another run.dir")


def _last_epoch(path: Path) -> int:
    numbers = [int(entry.stem) for entry in (path / "epochs").glob("*.toml") if entry.stem.isdigit()]
    return max(numbers, default=0)


def _take_epoch(directory: Path, epoch: int, config: Config) -> None:
    directory.mkdir(exist_ok=True)
    # The second guard, for network file systems that flock doesn't reach: only one process can make this file.
    try:
        write_file(directory / f"{epoch:05d}.toml", _as_saved(config).encode())
    except FileExistsError:
        raise _locked(directory.parent, "a trainer that started at the same moment") from None
