"""Checkpoints between the run directory and Ray Train's storage, each in its own form there.

In Ray Train's storage a checkpoint also has what else a new run directory needs, under `run/`.
"""

import json
import shutil
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfdist.config import Config
from kfdist.errors import EnvironmentFault

_MANIFEST = "manifest.json"
_RUN = "run"


@dataclass(frozen=True, kw_only=True)
class Held:
    """A checkpoint to be given to Ray Train.

    Attributes:
        name: What it is called there.
        directory: Where it stays meanwhile; whoever has given it removes that.
        metrics: What to say of it.
    """

    name: str
    directory: Path
    metrics: dict[str, Any]


class TrainCheckpoints:
    """What the worker of rank 0 knows of both places."""

    def __init__(self, config: Config, mark: str) -> None:
        """Looks at them.

        Args:
            config: Where the run's files are.
            mark: A file in Ray Train's storage, seen by all who share it; empty where that is a URI.
        """
        self._directory = config.run.directory
        self._shared = not mark or Path(mark).exists()
        self._done: dict[str, str] = {}
        self._failed = ""
        for left in self._directory.glob(".reported-*"):  # by a worker that was killed
            shutil.rmtree(left, ignore_errors=True)
        if not self._shared:
            print(
                f"Ray Train's storage {Path(mark).parents[1]} isn't shared by this node, so it gets no checkpoints; "
                f"they are in {self._directory / 'checkpoints'}. Give --storage a directory that all nodes see, or a "
                "URI",
                flush=True,
            )

    def restore(self, checkpoint: Any) -> None:
        """Puts Ray Train's newest checkpoint into the run directory if that has none as new; None: there is none.

        Where the storage is on another node's disk there is nothing to fetch: the ranks look for what nodes have.

        Raises:
            EnvironmentFault: It can't be fetched, and here is none to go on from.
        """
        if checkpoint is None or not self._shared:
            return
        present = _steps(self._directory)
        try:
            with checkpoint.as_directory() as source:
                step = json.loads((Path(source) / _MANIFEST).read_text(encoding="utf-8"))["step"]
                if not present or step > max(present):
                    self._put_back(Path(source), step)
                    print(f"the checkpoint of step {step} was fetched from Ray Train's storage", flush=True)
        except Exception as error:  # of whichever file system this is
            told = f"Ray Train's newest checkpoint, {checkpoint}, can't be fetched ({error})"
            if not present:
                raise EnvironmentFault(
                    f"{told}, and {self._directory} has none to go on from; mend the storage, or start anew with "
                    "another --storage"
                ) from error
            print(f"{told}; the run goes on from step {max(present)} in {self._directory}", flush=True)
            return
        present = {each: path for each, path in present.items() if each <= step}
        present[step] = self._directory / "checkpoints" / f"step-{step:08d}"
        # These it has, or had.
        self._done = {path.name: _written(path) for path in present.values()}

    def next(self) -> "Held | None":
        """Returns the newest checkpoint if Ray Train doesn't have it yet."""
        present = _steps(self._directory)
        if not self._shared or not present:
            return None
        newest = present[max(present)]
        digest = _written(newest)
        if self._done.get(newest.name) == digest:
            return None
        held = None
        try:
            held = Path(tempfile.mkdtemp(prefix=".reported-", dir=self._directory))
            # The ranks may remove the original before Ray Train has copied it; links take no room.
            shutil.copytree(newest, held, copy_function=_link, dirs_exist_ok=True)
            self._add_run(held / _RUN)
            manifest = json.loads((held / _MANIFEST).read_text(encoding="utf-8"))
        except OSError as error:  # they have done so already, or the disk is full
            if held is not None:
                shutil.rmtree(held, ignore_errors=True)
            if newest.exists() and self._failed != newest.name:
                self._failed = newest.name
                print(f"Ray Train isn't given {newest.name} ({error}); the run goes on", flush=True)
            return None
        self._done[newest.name] = digest
        # The name must be new to Ray Train, which would remove the new one with an old one of that name.
        name = f"{newest.name}-{uuid.uuid4().hex[:8]}"
        return Held(name=name, directory=held, metrics={key: manifest[key] for key in ("step", "world_size")})

    def _add_run(self, place: Path) -> None:
        (place / "epochs").mkdir(parents=True)
        newest = sorted((self._directory / "epochs").glob("*.toml"))[-1:]
        for file in (self._directory / "config.toml", self._directory / "costs.json", *newest):
            if file.exists():
                shutil.copy(file, place / file.relative_to(self._directory))

    def _put_back(self, source: Path, step: int) -> None:
        final = self._directory / "checkpoints" / f"step-{step:08d}"
        partial = final.with_suffix(".incomplete")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns(_RUN, ".*"))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        if not (self._directory / "config.toml").exists():
            shutil.copytree(source / _RUN, self._directory, dirs_exist_ok=True)


def _steps(directory: Path) -> dict[int, Path]:
    """Returns a run's whole-looking checkpoints by step."""
    found = {path.name.removeprefix("step-"): path for path in (directory / "checkpoints").glob("step-*")}
    return {int(name): path for name, path in found.items() if name.isdigit() and (path / _MANIFEST).exists()}


def _written(checkpoint: Path) -> str:
    """Returns a checkpoint's digest; empty if it has gone."""
    try:
        return json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError):
        return ""


def _link(source: str, target: str) -> None:
    try:
        Path(target).hardlink_to(source)
    except FileNotFoundError:
        raise
    except OSError:  # not every file system has links
        shutil.copy2(source, target)
