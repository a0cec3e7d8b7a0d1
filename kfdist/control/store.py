"""The controller's SQLite file: what belongs together in one transaction, durable before it is acknowledged.

The file is in WAL mode with `synchronous=FULL`: what was committed survives the process being killed, and the machine
losing power. People may read it with `sqlite3` while the controller runs; a second controller is kept out by a lock.
"""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kfdist.control.rows import (
    APPLICATION_ID,
    KEPT_ANSWERS,
    SCHEMA,
    SCHEMA_VERSION,
    Answer,
    Batch,
    Contents,
    EventRecord,
    assignment_of,
    owner_of,
    run_of,
    write_assignment,
    write_owner,
    write_run,
)
from kfdist.errors import EnvironmentFault


class Store:
    """The open file. Calls come from one thread at a time."""

    def __init__(self, path: Path) -> None:
        """Locks the file, then opens or makes it.

        Args:
            path: The SQLite file; its folder is made if it is missing.

        Raises:
            EnvironmentFault: Another controller has it, it is no file of ours, or it can't be written.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise EnvironmentFault(
                f"the controller's file {path} can't be made ({error.strerror}); choose another with --state"
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
        """Returns what was last committed."""
        with self._faults():
            runs = [run_of(row) for row in self._connection.execute("SELECT * FROM runs ORDER BY created_ns, rowid")]
            assignments = [assignment_of(row) for row in self._connection.execute("SELECT * FROM assignments")]
            owners = [owner_of(row) for row in self._connection.execute("SELECT * FROM owners")]
        return Contents(
            runs={run.name: run for run in runs},
            assignments={assignment.run: assignment for assignment in assignments},
            owners={owner.owner_id: owner for owner in owners},
        )

    def commit(self, batch: Batch) -> None:
        """Makes a batch durable, all of it or nothing.

        Raises:
            EnvironmentFault: The file can't be written; nothing was changed.
        """
        with self._faults(), self._transaction() as cursor:
            for update in batch.runs:
                write_run(cursor, update, batch.time_ns)
            for assignment in batch.assignments:
                write_assignment(cursor, assignment)
            for owner in batch.owners:
                write_owner(cursor, owner)
            if batch.answer is not None:
                cursor.execute(
                    "INSERT INTO answers (request_id, request_digest, message) VALUES (?, ?, ?)",
                    (batch.answer.request_id, batch.answer.request_digest, batch.answer.message),
                )
                cursor.execute("DELETE FROM answers WHERE serial <= ?", ((cursor.lastrowid or 0) - KEPT_ANSWERS,))

    def answer(self, request_id: str) -> Answer | None:
        """Returns what a mutation of this request id was answered, if there was one."""
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
        """Returns at most `limit` events of a run after one, oldest first."""
        with self._faults():
            rows = self._connection.execute(
                "SELECT event_id, time_ns, kind, text FROM events WHERE run = ? AND event_id > ? "
                "ORDER BY event_id LIMIT ?",
                (run, after, limit),
            )
            return [EventRecord(**dict(row)) for row in rows]

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 20, 0).decode(errors="replace").strip() or "unknown"
            raise EnvironmentFault(
                f"another controller (process {holder}) has the file {self.path}; end that one, "
                "or choose another file with --state"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _open(self) -> sqlite3.Connection:
        with self._faults():
            # Used by the thread that the ledger keeps for it, opened and closed by another.
            connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA busy_timeout = 5000")
        if connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0:
            connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if (application, version) != (APPLICATION_ID, SCHEMA_VERSION):
            whose = f"kfdist's format {version}" if application == APPLICATION_ID else "no file of kfdist's controller"
            raise EnvironmentFault(
                f"{self.path} is {whose}, this kfdist writes format {SCHEMA_VERSION}; choose another with --state"
            )
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise EnvironmentFault(
                f"the controller's file {self.path} can't be used: {error}; nothing was changed. "
                "Is the disk full or the file damaged? Another one can be chosen with --state"
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
