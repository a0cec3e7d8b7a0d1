"""The tables of the controller's SQLite file, and records as rows of them."""

import json
import sqlite3
from dataclasses import asdict, dataclass

from kfdist.control.run_rules import AssignmentRecord, Event, OwnerRecord, RunRecord, RunState
from kfdist.types import Desired, GroupSpec, RunSettings

SCHEMA_VERSION = 1
APPLICATION_ID = 0x6B664453  # "kfDS": tells our files from other people's databases

KEPT_CHANGES = 1000
"""Changes of a run that are kept for those who resume a watch."""

KEPT_EVENTS = 10_000
"""Events kept for each run."""

KEPT_ANSWERS = 10_000
"""Answers to mutations that are kept, over all runs, for those who repeat a request."""

SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
CREATE TABLE runs (
  name TEXT PRIMARY KEY, directory TEXT NOT NULL, total_steps INTEGER NOT NULL, created_ns INTEGER NOT NULL,
  epoch INTEGER NOT NULL, world_size INTEGER NOT NULL, begun INTEGER NOT NULL, state TEXT NOT NULL,
  step INTEGER NOT NULL, desired TEXT NOT NULL, settings_revision INTEGER NOT NULL,
  checkpoint_serial INTEGER NOT NULL, damping REAL NOT NULL, live_workers INTEGER NOT NULL,
  live_owners INTEGER NOT NULL, gauges TEXT NOT NULL, revision INTEGER NOT NULL
) STRICT;
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
CREATE TABLE owners (
  owner_id TEXT PRIMARY KEY, address TEXT NOT NULL, fingerprint TEXT NOT NULL, restarts INTEGER NOT NULL,
  pid INTEGER NOT NULL, live INTEGER NOT NULL
) STRICT;
CREATE TABLE assignments (
  run TEXT PRIMARY KEY, policy TEXT NOT NULL, groups TEXT NOT NULL, owner_by_group TEXT NOT NULL,
  revision INTEGER NOT NULL
) STRICT;
"""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a mutation was answered.

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
    """An event as it was stored."""

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
        config: The run's configuration, where it is new.
    """

    record: RunRecord
    message: bytes
    events: tuple[Event, ...] = ()
    config: str | None = None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One transaction."""

    time_ns: int
    runs: tuple[RunUpdate, ...] = ()
    assignments: tuple[AssignmentRecord, ...] = ()
    owners: tuple[OwnerRecord, ...] = ()
    answer: Answer | None = None


@dataclass(frozen=True, kw_only=True)
class Contents:
    """Everything that the controller keeps in memory as well."""

    runs: dict[str, RunRecord]
    assignments: dict[str, AssignmentRecord]
    owners: dict[str, OwnerRecord]


def write_run(cursor: sqlite3.Cursor, update: RunUpdate, time_ns: int) -> None:
    """Writes a run's record over the old one, adds its change and its events, and drops those beyond what is kept."""
    record = update.record
    row = {
        **{name: getattr(record, name) for name in ("name", "directory", "total_steps", "created_ns", "epoch")},
        **{name: getattr(record, name) for name in ("world_size", "step", "live_workers", "live_owners", "revision")},
        "begun": int(record.begun),
        "state": record.state.value,
        "desired": record.settings.desired.value,
        "settings_revision": record.settings.revision,
        "checkpoint_serial": record.settings.checkpoint_serial,
        "damping": record.settings.damping,
        "gauges": json.dumps(dict(record.gauges)),
    }
    columns = ", ".join(row)
    cursor.execute(f"INSERT OR REPLACE INTO runs ({columns}) VALUES ({', '.join(':' + name for name in row)})", row)
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
            "DELETE FROM events WHERE run = ?1 AND event_id <= "
            "(SELECT event_id FROM events WHERE run = ?1 ORDER BY event_id DESC LIMIT 1 OFFSET ?2)",
            (record.name, KEPT_EVENTS),
        )


def write_assignment(cursor: sqlite3.Cursor, assignment: AssignmentRecord) -> None:
    """Writes a run's assignment over the old one."""
    row = asdict(assignment) | {
        "groups": json.dumps([asdict(group) for group in assignment.groups]),
        "owner_by_group": json.dumps(dict(assignment.owner_by_group)),
    }
    cursor.execute(
        "INSERT OR REPLACE INTO assignments VALUES (:run, :policy, :groups, :owner_by_group, :revision)", row
    )


def write_owner(cursor: sqlite3.Cursor, owner: OwnerRecord) -> None:
    """Writes an owner over what was known of it."""
    row = asdict(owner) | {"live": int(owner.live)}
    cursor.execute(
        "INSERT OR REPLACE INTO owners VALUES (:owner_id, :address, :fingerprint, :restarts, :pid, :live)", row
    )


def run_of(row: sqlite3.Row) -> RunRecord:
    """Returns the record in a row of `runs`."""
    fields = dict(row)
    settings = RunSettings(
        revision=fields.pop("settings_revision"),
        desired=Desired(fields.pop("desired")),
        checkpoint_serial=fields.pop("checkpoint_serial"),
        damping=fields.pop("damping"),
    )
    fields |= {
        "state": RunState(fields["state"]),
        "begun": bool(fields["begun"]),
        "gauges": json.loads(fields["gauges"]),
        "settings": settings,
    }
    return RunRecord(**fields)


def assignment_of(row: sqlite3.Row) -> AssignmentRecord:
    """Returns the record in a row of `assignments`."""
    fields = dict(row)
    groups = tuple(GroupSpec(**group) for group in json.loads(fields.pop("groups")))
    return AssignmentRecord(groups=groups, owner_by_group=json.loads(fields.pop("owner_by_group")), **fields)


def owner_of(row: sqlite3.Row) -> OwnerRecord:
    """Returns the record in a row of `owners`."""
    fields = dict(row)
    fields["live"] = bool(fields["live"])
    return OwnerRecord(**fields)
