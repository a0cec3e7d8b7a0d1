"""The controller's SQLite file: what belongs together in one transaction, durable before it is acknowledged.

The file is in WAL mode with `synchronous=FULL`: what was committed survives the death of the process and a power
failure. Runs, assignments and owners are whole JSON documents, one a row, so that `sqlite3` reads them while the
controller runs: `SELECT name, record ->> 'state' FROM runs`. A lock keeps a second controller out.
"""

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from kfdist.control.control_records import AssignmentRecord, Event, OwnerRecord, RunRecord
from kfdist.control.series import KeptCounters
from kfdist.errors import EnvironmentFault

SCHEMA_VERSION = 2
APPLICATION_ID = 0x6B664453  # "kfDS": tells kfdist's files from other databases

KEPT_CHANGES = 1000
"""Changes kept for each run; a watch can resume from any of them."""

KEPT_EVENTS = 10_000
"""Events kept for each run."""

KEPT_ANSWERS = 10_000
"""Answers to mutations kept over all runs; a request repeated later than that is carried out again."""

BUSY_SECONDS = 5.0
"""How long a transaction waits for another process that writes to the file."""

_ANOTHER = "choose another file (control.database; `kfdist serve --state` goes before it)"

SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
CREATE TABLE runs (name TEXT PRIMARY KEY, record TEXT NOT NULL) STRICT;
CREATE TABLE assignments (name TEXT PRIMARY KEY, record TEXT NOT NULL) STRICT;
CREATE TABLE owners (name TEXT PRIMARY KEY, record TEXT NOT NULL) STRICT;
CREATE TABLE configs (run TEXT PRIMARY KEY, config TEXT NOT NULL) STRICT;
CREATE TABLE changes (
  run TEXT NOT NULL, revision INTEGER NOT NULL, message BLOB NOT NULL, PRIMARY KEY (run, revision)
) STRICT, WITHOUT ROWID;
CREATE TABLE events (
  event_id INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL, time_ns INTEGER NOT NULL, kind TEXT NOT NULL,
  text TEXT NOT NULL
) STRICT;
CREATE INDEX events_by_run ON events (run, event_id);
CREATE TABLE answers (
  serial INTEGER PRIMARY KEY AUTOINCREMENT, request_id TEXT NOT NULL UNIQUE, request_digest TEXT NOT NULL,
  message BLOB NOT NULL
) STRICT;
"""

# `KeptCounters` of kfdist.control.series, as Prometheus saw them last. A file of an earlier kfdist gets the table, too.
_COUNTERS_TABLE = "CREATE TABLE IF NOT EXISTS counters (run TEXT PRIMARY KEY, counters TEXT NOT NULL) STRICT"

_COUNTERS = TypeAdapter(KeptCounters)
_RUN, _ASSIGNMENT, _OWNER = TypeAdapter(RunRecord), TypeAdapter(AssignmentRecord), TypeAdapter(OwnerRecord)

Record = TypeVar("Record", RunRecord, AssignmentRecord, OwnerRecord)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How a mutation was answered.

    Attributes:
        request_id: The caller's name for the call.
        request_digest: SHA-256 of the method and the request, hexadecimal.
        message: The response, serialized.
    """

    request_id: str
    request_digest: str
    message: bytes


@dataclass(frozen=True, kw_only=True)
class EventRecord:
    """An event as stored."""

    event_id: int
    time_ns: int
    kind: str
    text: str


@dataclass(frozen=True, kw_only=True)
class RunUpdate:
    """A run's new record with all that becomes durable beside it.

    Attributes:
        record: The record; its revision is one above the last.
        message: The Run message that watchers get for it, serialized.
        events: What happened.
        config: The run's configuration if it is new, else None.
    """

    record: RunRecord
    message: bytes
    events: tuple[Event, ...] = ()
    config: str | None = None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One transaction."""

    time_ns: int = field(default_factory=time.time_ns)
    runs: tuple[RunUpdate, ...] = ()
    assignments: tuple[AssignmentRecord, ...] = ()
    owners: tuple[OwnerRecord, ...] = ()
    forgotten_owners: frozenset[str] = frozenset()
    answer: Answer | None = None


@dataclass(frozen=True, kw_only=True)
class Contents:
    """All records by name, runs in the order in which they were made known."""

    runs: dict[str, RunRecord]
    assignments: dict[str, AssignmentRecord]
    owners: dict[str, OwnerRecord]


class Store:
    """The open file. Calls come from one thread at a time."""

    def __init__(self, path: Path) -> None:
        """Locks the file, then opens it or makes a new one.

        Args:
            path: The SQLite file; its folder is made if it is missing.

        Raises:
            EnvironmentFault: Another controller has it open, it is not a file of kfdist's controller, its format is
                another kfdist's, or it can't be written.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise EnvironmentFault(
                f"the controller's file {path} can't be made ({error.strerror}); {_ANOTHER}"
            ) from None
        try:
            self._take_lock()
            self._connection = self._open()
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Closes the file and lets another controller have it; safe to call twice."""
        if self._lock >= 0:
            self._connection.close()
            os.close(self._lock)
            self._lock = -1

    def load(self) -> Contents:
        """Returns what was last committed.

        Raises:
            EnvironmentFault: The file can't be read, or a record in it is malformed.
        """
        with self._faults():
            return Contents(
                runs=self._records("runs", _RUN),
                assignments=self._records("assignments", _ASSIGNMENT),
                owners=self._records("owners", _OWNER),
            )

    def commit(self, batch: Batch) -> None:
        """Makes a batch durable, all of it or nothing.

        Raises:
            EnvironmentFault: The file can't be written; nothing was changed.
        """
        with self._faults(), self._transaction() as cursor:
            for update in batch.runs:
                _write_run(cursor, update, batch.time_ns)
            for assignment in batch.assignments:
                _write_record(cursor, "assignments", assignment.run, _ASSIGNMENT.dump_json(assignment))
            # A replacement: owners lie in the order of their last change, by which dead ones are forgotten.
            cursor.executemany("DELETE FROM owners WHERE name = ?", [(owner.owner_id,) for owner in batch.owners])
            for owner in batch.owners:
                _write_record(cursor, "owners", owner.owner_id, _OWNER.dump_json(owner))
            cursor.executemany("DELETE FROM owners WHERE name = ?", [(name,) for name in batch.forgotten_owners])
            if batch.answer is not None:
                _write_answer(cursor, batch.answer)

    def keep_counters(self, counters: Mapping[str, KeptCounters]) -> None:
        """Makes the counters of some runs durable.

        Raises:
            EnvironmentFault: The file can't be written; nothing was changed.
        """
        rows = [(run, _COUNTERS.dump_json(kept).decode()) for run, kept in counters.items()]
        with self._faults(), self._transaction() as cursor:
            # A new row each time: the order of rows is that in which runs were counted last.
            cursor.executemany("INSERT OR REPLACE INTO counters VALUES (?, ?)", rows)

    def counters(self, limit: int) -> dict[str, KeptCounters]:
        """Returns the kept counters of the runs that were counted last, at most `limit`, the last one last."""
        with self._faults():
            rows = self._connection.execute(
                "SELECT run, counters FROM counters ORDER BY rowid DESC LIMIT ?", (limit,)
            ).fetchall()
            return {row["run"]: _COUNTERS.validate_json(row["counters"]) for row in reversed(rows)}

    def answer(self, request_id: str) -> Answer | None:
        """Returns how a mutation with this request id was answered, None if it is unknown."""
        with self._faults():
            row = self._connection.execute(
                "SELECT request_id, request_digest, message FROM answers WHERE request_id = ?", (request_id,)
            ).fetchone()
        return Answer(**dict(row)) if row else None

    def changes(self, run: str, after: int) -> list[tuple[int, bytes]]:
        """Returns the kept changes of a run after a revision, oldest first: (revision, Run message)."""
        with self._faults():
            rows = self._connection.execute(
                "SELECT revision, message FROM changes WHERE run = ? AND revision > ? ORDER BY revision", (run, after)
            )
            return [(row["revision"], row["message"]) for row in rows]

    def events(self, run: str, after: int, limit: int) -> list[EventRecord]:
        """Returns at most `limit` events of a run after the event `after`, oldest first."""
        with self._faults():
            rows = self._connection.execute(
                "SELECT event_id, time_ns, kind, text FROM events WHERE run = ? AND event_id > ? "
                "ORDER BY event_id LIMIT ?",
                (run, after, limit),
            )
            return [EventRecord(**dict(row)) for row in rows]

    def _records(self, table: str, adapter: TypeAdapter[Record]) -> dict[str, Record]:
        rows = self._connection.execute(f"SELECT name, record FROM {table} ORDER BY rowid")
        return {row["name"]: adapter.validate_json(row["record"]) for row in rows}

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 20, 0).decode(errors="replace").strip() or "unknown"
            raise EnvironmentFault(
                f"another controller (process {holder}) has the file {self.path}; end that one, or {_ANOTHER}"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _open(self) -> sqlite3.Connection:
        with self._faults():
            # The ledger's own thread uses it; the thread of the event loop opens and closes it.
            connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.row_factory = sqlite3.Row
        if connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0:
            connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if application != APPLICATION_ID:
            raise EnvironmentFault(f"{self.path} is no file of kfdist's controller; {_ANOTHER}")
        if version != SCHEMA_VERSION:
            raise EnvironmentFault(
                f"{self.path} has format {version}, and this kfdist reads and writes format {SCHEMA_VERSION}: move it "
                f"away, or {_ANOTHER}. Only the controller's history is in it; runs resume from "
                "their checkpoints without it"
            )
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(_COUNTERS_TABLE)

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValidationError) as error:
            reason = " ".join(str(error).split())
            raise EnvironmentFault(
                f"the controller's file {self.path} can't be used: {reason}; nothing was changed. "
                f"Is the disk full or the file damaged? If so, {_ANOTHER}"
            ) from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Cursor]:
        cursor = self._connection.cursor()
        cursor.execute("BEGIN IMMEDIATE")
        try:
            yield cursor
            cursor.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                cursor.execute("ROLLBACK")
            raise


def _write_record(cursor: sqlite3.Cursor, table: str, name: str, document: bytes) -> None:
    # An update and no replacement: the row keeps its place, which is the order in which runs were made known.
    cursor.execute(
        f"INSERT INTO {table} VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET record = excluded.record",
        (name, document.decode()),
    )


def _write_run(cursor: sqlite3.Cursor, update: RunUpdate, time_ns: int) -> None:
    """Writes a run's record, its change and its events, and drops changes and events beyond those kept."""
    record = update.record
    _write_record(cursor, "runs", record.name, _RUN.dump_json(record))
    cursor.execute("INSERT INTO changes VALUES (?, ?, ?)", (record.name, record.revision, update.message))
    cursor.execute("DELETE FROM changes WHERE run = ? AND revision <= ?", (record.name, record.revision - KEPT_CHANGES))
    if update.config is not None:
        cursor.execute("INSERT OR REPLACE INTO configs VALUES (?, ?)", (record.name, update.config))
    for event in update.events:
        cursor.execute(
            "INSERT INTO events (run, time_ns, kind, text) VALUES (?, ?, ?, ?)",
            (record.name, time_ns, event.kind, event.text),
        )
    if update.events:
        cursor.execute(
            "DELETE FROM events WHERE run = :run AND event_id <= "
            "(SELECT event_id FROM events WHERE run = :run ORDER BY event_id DESC LIMIT 1 OFFSET :kept)",
            {"run": record.name, "kept": KEPT_EVENTS},
        )


def _write_answer(cursor: sqlite3.Cursor, answer: Answer) -> None:
    cursor.execute(
        "INSERT INTO answers (request_id, request_digest, message) VALUES (?, ?, ?)",
        (answer.request_id, answer.request_digest, answer.message),
    )
    cursor.execute("DELETE FROM answers WHERE serial <= ?", ((cursor.lastrowid or 0) - KEPT_ANSWERS,))
