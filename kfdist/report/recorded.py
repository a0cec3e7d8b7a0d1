"""What a run's directory says about it, read without holding more of a long run than a page can show."""

import json
import sqlite3
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.system.files import lock_holder

MOST_STEP_LINES = 8_000
"""How many of the lines that say how steps went are read; of more, every second, every third, ..."""
SHOWN_EVENTS = 200
"""The newest that a page has."""

_STEP_LINE = b'{"event": "step"'
_PASS_LINE = b'{"event": "epoch"'
_OF_A_WINDOW = {"staleness", "phases", "inversions", "totals", "diagnostics"}
Line = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A run as it was recorded. Of a resumed run, lines of steps that were lost and made again are left out.

    Attributes:
        directory: Where.
        config: The resolved configuration; empty where it can't be read.
        summary: As of its end, or of its last start; empty before.
        starts: One line each.
        steps: Log periods, oldest first.
        evaluations: The same of evaluations.
        told: What else is worth telling: checkpoints, starts, ends, ...
        windows: Of `history.jsonl`, each with the number of its start in that file as `of_start`.
        spectra: Of `history.jsonl`.
        methods: The method of each block, by its name, in the model's order.
        controller_events: What the controller saw, the newest `SHOWN_EVENTS`: (seconds since 1970, kind, text).
        holder: Who trains it now; None if nobody does.
        remarks: What could not be read, in sentences.
    """

    directory: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    starts: list[Line] = field(default_factory=list)
    steps: list[Line] = field(default_factory=list)
    evaluations: list[Line] = field(default_factory=list)
    told: list[Line] = field(default_factory=list)
    windows: list[Line] = field(default_factory=list)
    spectra: list[Line] = field(default_factory=list)
    methods: Mapping[str, str] = field(default_factory=dict)
    controller_events: list[tuple[float, str, str]] = field(default_factory=list)
    holder: str | None = None
    remarks: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, directory: Path) -> Self:
        """Reads a run directory.

        Raises:
            ConfigError: It isn't one.
            EnvironmentFault: It can't be read.
        """
        try:
            return cls._read(directory)
        except OSError as error:
            raise EnvironmentFault(f"can't read the run directory {directory}: {error}; check owner and mode") from None

    @classmethod
    def _read(cls, directory: Path) -> Self:
        if not any((directory / name).is_file() for name in ("config.toml", "metrics.jsonl", "summary.json")):
            what = "has no config.toml, metrics.jsonl or summary.json" if directory.is_dir() else "isn't a directory"
            raise ConfigError(f"{directory} is no run directory: it {what}; name a run, or give its directory")
        remarks: list[str] = []
        metrics = _without_lost(_lines(directory / "metrics.jsonl", remarks))
        history = _without_lost(_lines(directory / "history.jsonl", remarks))
        config = _config(directory / "config.toml", remarks)
        blocks = next((line for line in reversed(history) if line["event"] == "start"), {})
        return cls(
            directory=directory,
            config=config,
            summary=_summary(directory / "summary.json", remarks),
            starts=[line for line in metrics if line["event"] == "start"],
            steps=[line for line in metrics if line["event"] == "step"],
            evaluations=[line for line in metrics if line["event"] == "evaluation"],
            told=[line for line in metrics if line["event"] not in ("step", "evaluation")],
            windows=list(_windows(history)),
            spectra=[line for line in history if line["event"] == "spectrum" and line.get("factors")],
            methods=dict(zip(blocks.get("blocks", ()), blocks.get("methods", ()), strict=True)),
            controller_events=_controller_events(directory, config, remarks),
            holder=lock_holder(directory / "lock") if (directory / "lock").exists() else None,
            remarks=remarks,
        )

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.config.get("run", {}).get("name") or self.summary.get("run") or self.directory.name)

    @property
    def last_step(self) -> int:
        """The last step that anything is known of."""
        known = (*self.steps[-1:], *self.windows[-1:], *self.starts[-1:])
        return max((line["step"] for line in known), default=0)

    def seconds(self) -> list[tuple[int, float]]:
        """Returns (step, seconds trained up to it) at each start and log period; pauses between starts don't count."""
        found, trained, last = [], 0.0, None
        marks = sorted((*self.starts, *self.steps), key=lambda line: (line["time"], line["event"] != "start"))
        for line in marks:
            if line["event"] != "start" and last is not None:
                trained += max(0.0, line["time"] - last)
            last = line["time"]
            found.append((line["step"], trained))
        return found

    def evaluated(self, weights: str) -> list[Line]:
        """Returns the evaluations of the "trained" weights, or of their average ("averaged")."""
        return [line for line in self.evaluations if line.get("weights", "trained") == weights]

    def by_start(self) -> list[Line]:
        """Returns the last totals of each start that has any; every start counts from 0."""
        return list({window["of_start"]: window["totals"] for window in self.windows}.values())


def _lines(file: Path, remarks: list[str]) -> Iterator[Line]:
    """Yields a file's lines, thinned where steps have very many, without those that were cut off."""
    try:
        with file.open("rb") as lines:
            every = max(1, -(-sum(line.startswith(_STEP_LINE) for line in lines) // MOST_STEP_LINES))
            lines.seek(0)
            damaged = steps = 0
            for line in lines:
                if line.startswith(_PASS_LINE):
                    continue
                if line.startswith(_STEP_LINE):
                    steps += 1
                    if steps % every:
                        continue
                found = _parsed(line)
                if found is None:
                    damaged += 1
                else:
                    yield found
    except FileNotFoundError:
        remarks.append(f"There is no {file.name}: the run ended before its first step, or an older kfdist trained it.")
        return
    if damaged:
        which = "1 line is" if damaged == 1 else f"{damaged} lines are"
        remarks.append(f"{which} left out of {file.name}: damaged, or cut off while being written.")
    if every > 1:
        remarks.append(f"Of {file.name}, one log period in {every} is shown.")


def _parsed(line: bytes) -> Line | None:
    """Returns a line that says what happened, at which step and when; None if it doesn't."""
    try:
        found = json.loads(line)
        whole = isinstance(found["event"], str) and isinstance(found["step"], int) and found["time"] >= 0
    except (ValueError, KeyError, TypeError):
        return None
    return found if whole else None


def _without_lost(lines: Iterator[Line]) -> list[Line]:
    """Drops lines of steps beyond the one that a later start went on from: they were made again."""
    kept: list[Line] = []
    for line in lines:
        if line["event"] == "start":
            kept = [each for each in kept if each["event"] == "start" or each["step"] <= line["step"]]
        kept.append(line)
    return kept


def _windows(history: Iterable[Line]) -> Iterator[Line]:
    """Yields the windows of steps that have all that is asked of them; other lines are of older kfdists."""
    start = 0
    for line in history:
        if line["event"] == "start":
            start += 1
        elif line["event"] == "window" and _OF_A_WINDOW <= line.keys():
            yield {**line, "of_start": start}


def _config(file: Path, remarks: list[str]) -> Mapping[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        remarks.append("There is no config.toml: the run never started.")
    except ValueError as error:
        remarks.append(f"config.toml can't be read ({error}).")
    return {}


def _summary(file: Path, remarks: list[str]) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        remarks.append("summary.json holds no object.")
    except FileNotFoundError:
        remarks.append("There is no summary.json: the run never came to its first step.")
    except ValueError as error:
        remarks.append(f"summary.json can't be read ({error}).")
    return {}


def _controller_events(directory: Path, config: Mapping[str, Any], remarks: list[str]) -> list[tuple[float, str, str]]:
    file = Path(config.get("control", {}).get("database") or directory / "control.sqlite")
    if not file.is_file():
        return []
    try:
        # A controller may have it open. If none has, there is no log beside it, and reading must not leave one there.
        mode = "mode=ro" if file.with_name(f"{file.name}-wal").exists() else "immutable=1"
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?{mode}", uri=True, timeout=1.0)) as connection:
            rows = connection.execute(
                "SELECT time_ns, kind, text FROM events WHERE run = ? ORDER BY event_id DESC LIMIT ?",
                (config.get("run", {}).get("name", ""), SHOWN_EVENTS),
            ).fetchall()
    except sqlite3.Error as error:
        remarks.append(f"The controller's events in {file} can't be read ({error}).")
        return []
    return [(time_ns / 1e9, kind, text) for time_ns, kind, text in reversed(rows)]
