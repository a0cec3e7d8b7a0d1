"""A run as its directory tells it: where it stands, what it measured, what happened. Needs no controller."""

import json
import math
import os
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from kfdist.cli.control_files import read_rows
from kfdist.control.client import EventView, RunView
from kfdist.control.control_records import RunState
from kfdist.system.files import lock_holder
from kfdist.system.run_notices import Place, place_of
from kfdist.system.run_summary import unsaved

DATABASE = "control.sqlite"
_MARKS = ("config.toml", "summary.json", DATABASE)
_TAIL_BYTES = 1 << 20
"""How much of the end of metrics.jsonl tells where a run stands: a line a log period, each of about a kilobyte."""

_ENDED = {state.value: state for state in (RunState.FINISHED, RunState.STOPPED, RunState.FAILED)}


@dataclass(frozen=True)
class RunFiles:
    """A run's directory. What is read of it is kept, so one of these is for one look."""

    path: Path

    @classmethod
    def at(cls, path: Path) -> "RunFiles | None":
        """Returns the run in a directory; None if there is none."""
        return cls(path) if any((path / mark).is_file() for mark in _MARKS) else None

    def again(self) -> "RunFiles":
        """Returns the same run, to be read anew."""
        return RunFiles(self.path)

    @property
    def place(self) -> Place | None:
        """Where the directory is, however its path is written."""
        return place_of(self.path)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The configuration of its last start; empty before the first."""
        try:
            return tomllib.loads((self.path / "config.toml").read_text(encoding="utf-8-sig"))
        except (OSError, ValueError):
            return {}

    @property
    def name(self) -> str:
        """The run's name."""
        return _of(self.config, "run", "name") or self._summary.get("run") or self.path.absolute().name

    @cached_property
    def trainer(self) -> str:
        """Who trains the run now, as "process N on HOST, started TIME"; empty if nobody does."""
        try:
            return lock_holder(self.path / "lock") or ""
        except OSError:
            return ""

    @property
    def trainer_pid(self) -> int:
        """The process of `trainer`; 0 if nobody trains the run, or its lock tells otherwise."""
        pid = next(iter(self.trainer.split()[1:2]), "")
        return int(pid) if pid.isdigit() else 0

    @property
    def control_address(self) -> str:
        """Where the controller of its last start served; empty if it had none."""
        if _of(self.config, "cluster", "link") == "local":
            return ""
        address = str(_of(self.config, "control", "address") or "")
        return "" if address.endswith(":0") else address

    @property
    def security(self) -> tuple[str | None, str | None]:
        """The directory of certificates and the token's file, as configured."""
        return _of(self.config, "security", "certificates"), _of(self.config, "security", "token_file")

    @property
    def last_start(self) -> int:
        """The number of its last start, 0 if there was none."""
        return max((int(each.stem) for each in (self.path / "epochs").glob("*.toml") if each.stem.isdigit()), default=0)

    @property
    def checkpoint(self) -> int | None:
        """The step of its newest checkpoint."""
        names = [each.name.removeprefix("step-") for each in (self.path / "checkpoints").glob("step-*")]
        return max((int(name) for name in names if name.isdigit()), default=None)

    @property
    def state(self) -> RunState:
        """Where it stands; LOST if its processes ended without having said how."""
        if self.trainer:
            return RunState.RUNNING
        if (ended := _ENDED.get(str(self._summary.get("status")))) is not None:
            return ended
        return RunState.LOST if self.last_start else RunState.CREATED

    @property
    def heard(self) -> datetime | None:
        """When it last told something: when it ended, of a run that has."""
        return _time(self._lines[-1]) if self._lines else None

    def view(self) -> RunView:
        """Returns the run as a controller would show it."""
        return RunView(
            name=self.name,
            state=self.state,
            revision=0,
            epoch=self.last_start,
            step=self._step,
            total_steps=_of(self.config, "run", "steps") or 0,
            live_workers=self._ranks if self.trainer else 0,
            live_owners=0,
            created=self._created,
            directory=str(self.path.absolute()),
            gauges=self._gauges,
            settings={},
            settings_revision=0,
            obeyed_revision=0,
            obeyed_step=0,
            world_size=self._ranks,
            changed=(),
        )

    def remarks(self) -> dict[str, object]:
        """Returns what else is known: when it ended, what tests found, its newest checkpoint, what was wrong."""
        staleness = self._summary.get("staleness_steps") or {}
        known = {
            "ended" if self.state.ended else "last heard of": self.heard,
            "seconds trained": self._summary.get("seconds"),
            **self._evaluated(),
            "staleness median": staleness.get("p50"),
            "staleness max": staleness.get("max"),
            "checkpoint": self.checkpoint,
            "unsaved steps": self._summary.get("unsaved_steps") or None,
            "stopped because": self._summary.get("stop_reason"),
            "error": self._summary.get("error"),
        }
        return {name: value for name, value in known.items() if value not in (None, "")}

    def _evaluated(self) -> dict[str, object]:
        """Returns what the last evaluation found, of the trained weights and, where an average is kept, of that."""
        step = self._last("evaluation").get("step")
        found: dict[str, object] = {}
        for line in self._lines:
            if line["event"] == "evaluation" and line.get("step") == step:
                whose = "averaged " if line.get("weights") == "averaged" else ""
                tested = {key: value for key, value in line.items() if key.startswith("test_")}
                found |= {f"{whose}{key.replace('_', ' ')}": value for key, value in tested.items()}
        return found

    def advice(self) -> str:
        """Says what can be done with a run that trains no more."""
        if self.state is RunState.FINISHED:
            if lost := unsaved(self._summary):
                return lost
            given = "run.steps" if _of(self.config, "run", "steps") else "run.epochs"
            return f"a higher {given} trains on from here"
        if self.checkpoint is None:
            return "there is no checkpoint: the command that started it begins anew"
        return f"the command that started it resumes it from step {self.checkpoint}"

    def events(self, *, after: int = 0) -> list[EventView]:
        """Returns what happened, oldest first: as its controller noted it, else as its ranks did."""
        found = self._controllers_events() or list(self._ranks_events())
        return [event for event in found if event.event_id > after]

    def follow(self, *, seconds: float = 1.0) -> Iterator[RunView]:
        """Yields the run now and whenever it has changed, until nobody trains it any more."""
        last = None
        while True:
            look = self.again()
            trained, view = look.trainer, look.view()
            if view != last:
                yield view
                last = view
            if not trained:
                return
            time.sleep(seconds)

    def losses(self) -> list[float]:
        """Returns the training losses of the last log periods, oldest first."""
        return [
            math.nan if line.get("loss") is None else float(line["loss"])
            for line in self._lines
            if line["event"] == "step"
        ]

    def standing(self) -> str:
        """Says in a few words where it stands, such as "finished at step 120/120"."""
        view = self.view()
        return f"{view.state} at step {view.step}" + (f"/{view.total_steps}" if view.total_steps else "")

    @cached_property
    def _summary(self) -> Mapping[str, Any]:
        try:
            content = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    @cached_property
    def _lines(self) -> list[Mapping[str, Any]]:
        """The last lines of metrics.jsonl."""
        try:
            with (self.path / "metrics.jsonl").open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _TAIL_BYTES))
                return list(filter(None, map(_line, file)))
        except OSError:
            return []

    def _last(self, event: str) -> Mapping[str, Any]:
        return next((line for line in reversed(self._lines) if line["event"] == event), {})

    @property
    def _step(self) -> int:
        return next((line["step"] for line in reversed(self._lines) if isinstance(line.get("step"), int)), 0)

    @property
    def _ranks(self) -> int:
        """How many ranks its last start has; 0 if that is too long ago to be found."""
        return int(self._last("start").get("world_size") or 0)

    @property
    def _gauges(self) -> dict[str, float]:
        line = self._last("step")
        worst = (line.get("staleness") or {}).get("max")
        found = {"kfdist_loss": line.get("loss"), "kfdist_accuracy": line.get("accuracy")}
        return {
            name: float(value)
            for name, value in {**found, "kfdist_staleness_steps": worst}.items()
            if isinstance(value, (int, float))
        }

    @property
    def _created(self) -> datetime:
        """When it was first started, as far as files tell."""
        files = [self.path / "epochs" / "00001.toml", *(self.path / mark for mark in _MARKS)]
        times = [file.stat().st_mtime for file in files if file.exists()]
        return datetime.fromtimestamp(min(times, default=0.0), UTC)

    def _controllers_events(self) -> list[EventView]:
        database = _of(self.config, "control", "database")
        return read_events(Path(database) if database else self.path / DATABASE, self.name)

    def _ranks_events(self) -> Iterator[EventView]:
        try:
            with (self.path / "metrics.jsonl").open("rb") as file:
                lines = [line for line in map(_line, file) if line and line["event"] not in ("step", "epoch")]
        except OSError:
            return
        for number, line in enumerate(lines, 1):
            told = {key: value for key, value in line.items() if key not in ("event", "time", "versions")}
            text = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in told.items() if value != "")
            yield EventView(event_id=number, time=_time(line), kind=line["event"], text=text)


def read_events(database: Path, run: str) -> list[EventView]:
    """Reads a run's events from a controller's file; none if it can't be read."""
    rows = read_rows(database, "SELECT event_id, time_ns, kind, text FROM events WHERE run = ? ORDER BY event_id", run)
    return [
        EventView(event_id=number, time=datetime.fromtimestamp(time_ns / 1e9, UTC), kind=kind, text=text)
        for number, time_ns, kind, text in rows
    ]


def _line(line: bytes) -> Mapping[str, Any] | None:
    try:
        content = json.loads(line)
    except ValueError:  # the first or the last, cut off
        return None
    return content if isinstance(content, dict) and "event" in content and "time" in content else None


def _time(line: Mapping[str, Any]) -> datetime:
    return datetime.fromtimestamp(line["time"], UTC)


def _of(table: Mapping[str, Any], section: str, key: str) -> Any:
    found = table.get(section)
    return found.get(key) if isinstance(found, dict) else None
