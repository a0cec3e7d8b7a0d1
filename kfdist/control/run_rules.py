"""The controller's records of runs and owners, and the rules by which a run's record changes.

The rules are pure functions from a record to a `Change`: nothing here stores, sends or reads a clock.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import ConfigDict

from kfdist.policies import tuning
from kfdist.rpc._generated.kfdist.v1 import inversion_pb2, run_pb2
from kfdist.rpc.beats import method_settings_message
from kfdist.rpc.status import Refusal
from kfdist.types import Desired, GroupName, GroupSpec, InForce, RunSettings, Value


class RunState(StrEnum):
    """Where a run stands (protos/kfdist/v1/run.proto)."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FINISHED = "finished"
    FAILED = "failed"
    LOST = "lost"

    @property
    def ended(self) -> bool:
        """Whether only a new start can move the run on."""
        return self in (RunState.STOPPED, RunState.FINISHED, RunState.FAILED)


SHOWN_GROUPS = 8
"""Groups that an event names."""

MOST_ASKED = 64
"""Requests whose texts are kept until the ranks obey them."""

PHASES: Mapping[str, RunState] = {
    "running": RunState.RUNNING,
    "waiting": RunState.RUNNING,  # a wait that all ranks agreed on needs no action
    "paused": RunState.PAUSED,
    "finished": RunState.FINISHED,
    "stopped": RunState.STOPPED,
    "failed": RunState.FAILED,
}
"""The phases that ranks report, and the state that rank 0's phase gives the run."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run.

    Attributes:
        name: Its name.
        directory: Where its files are, shown to users.
        total_steps: Its planned number of steps, 0 if unknown.
        created_ns: When it was made known, nanoseconds since 1970.
        epoch: Its newest start.
        world_size: Ranks of its newest start; 0 before the first one has registered.
        begun: Whether a rank of its newest start has reported.
        state: Where it stands.
        step: The step that rank 0 last reported.
        settings: What users asked of it.
        asked: What of it the ranks haven't obeyed yet: its revision, and a text for users.
        obeyed_revision: The newest revision of the settings that all ranks have taken up.
        obeyed_step: The step at which they did.
        in_force: What the ranks go by, as rank 0 last said in this start.
        fingerprint: What the numbers of its ranks depend on.
        live_workers: Ranks alive within the lease.
        live_owners: Owners alive within the lease.
        gauges: Rank 0's gauges by metric name.
        revision: Rises by one at every change of this record.
    """

    # Stored as JSON, which has no word for a loss that is NaN.
    __pydantic_config__ = ConfigDict(ser_json_inf_nan="strings")

    name: str
    directory: str = ""
    total_steps: int = 0
    created_ns: int = 0
    epoch: int = 0
    world_size: int = 0
    begun: bool = False
    state: RunState = RunState.CREATED
    step: int = 0
    settings: RunSettings = RunSettings()
    asked: tuple[tuple[int, str], ...] = ()
    obeyed_revision: int = 0
    obeyed_step: int = 0
    in_force: InForce = InForce()
    fingerprint: str = ""
    live_workers: int = 0
    live_owners: int = 0
    gauges: Mapping[str, float] = field(default_factory=dict)
    revision: int = 0

    def message(self) -> run_pb2.Run:
        """Returns the message that users get of it."""
        return run_pb2.Run(
            name=self.name,
            state=f"RUN_STATE_{self.state.name}",
            revision=self.revision,
            epoch=self.epoch,
            step=self.step,
            total_steps=self.total_steps,
            live_workers=self.live_workers,
            live_owners=self.live_owners,
            created=timestamp(self.created_ns),
            directory=self.directory,
            gauges=self.gauges,
            settings=method_settings_message(self.in_force.values) if self.in_force.values else None,
            settings_revision=self.settings.revision,
            obeyed_revision=self.obeyed_revision,
            obeyed_step=self.obeyed_step,
            world_size=self.world_size,
            changed=self.in_force.changed,
        )


@dataclass(frozen=True, kw_only=True)
class OwnerRecord:
    """One owner, as it registered.

    Attributes:
        owner_id: Its name, kept over restarts.
        address: Where its InversionService listens.
        fingerprint: What its numbers depend on.
        restarts: Earlier starts under this name.
        pid: Its process.
        live: Whether it was alive within the lease when this was written.
        draining: Whether it is to get no new jobs.
    """

    owner_id: str
    address: str
    fingerprint: str = ""
    restarts: int = 0
    pid: int = 0
    live: bool = True
    draining: bool = False

    @property
    def takes_jobs(self) -> bool:
        """Whether groups are dealt to it."""
        return self.live and not self.draining

    def message(self) -> inversion_pb2.Owner:
        """Returns the message that members get of it."""
        return inversion_pb2.Owner(
            owner_id=self.owner_id, address=self.address, fingerprint=self.fingerprint, draining=self.draining
        )


@dataclass(frozen=True, kw_only=True)
class AssignmentRecord:
    """Which owner inverts which group of a run.

    Attributes:
        run: The run.
        policy: The rule that deals groups (kfdist.policies.assignment).
        groups: The run's groups, as rank 0 registered them.
        owner_by_group: The owner of each group; empty without owners.
        revision: Rises whenever `owner_by_group` changes.
        seconds: What inversions took, by group, if users wanted the groups dealt by that; else empty.
    """

    run: str
    policy: str = "round_robin"
    groups: tuple[GroupSpec, ...] = ()
    owner_by_group: Mapping[GroupName, str] = field(default_factory=dict)
    revision: int = 0
    seconds: Mapping[GroupName, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened in a run: a word for programs and a text for users."""

    kind: str
    text: str


@dataclass(frozen=True)
class Change:
    """A run's record after something happened, and the events that tell of it."""

    record: RunRecord
    events: tuple[Event, ...] = ()


def created(record: RunRecord | None, *, name: str, directory: str, total_steps: int, now_ns: int) -> Change:
    """Makes a run known, or prepares a known one for its next start: its settings are again as configured."""
    if record is None:
        made = RunRecord(name=name, directory=directory, total_steps=total_steps, created_ns=now_ns)
        return Change(made, (Event(kind="created", text=f"run {name} made known"),))
    reset = replace(
        _reset(record),
        directory=directory,
        total_steps=total_steps,
        state=RunState.CREATED,
        begun=False,
        gauges={},
        in_force=InForce(),
    )
    lost = f"; nobody obeyed: {', '.join(text for _, text in record.asked)}" if record.asked else ""
    text = f"run {name} is about to start again; settings as configured, or as its checkpoint has them{lost}"
    return Change(reset, (Event(kind="created", text=text),))


def announced(record: RunRecord | None, *, name: str, directory: str, total_steps: int, now_ns: int) -> Change:
    """Makes known the run that a controller was started for; a known one keeps its state and settings."""
    if record is None:
        return created(None, name=name, directory=directory, total_steps=total_steps, now_ns=now_ns)
    return Change(replace(record, directory=directory, total_steps=total_steps))


def started(record: RunRecord, *, epoch: int, world_size: int) -> Change:
    """Opens the start `epoch` of a run, when its first rank registers.

    A run that hadn't ended keeps its settings, so that ranks that crashed and restarted stay paused. One that had ended
    gets them reset.
    """
    if record.state.ended:
        record = _reset(record)
    opened = replace(
        record,
        # The new start's ranks have seen no request for fresh inverses, and must not take an old one for a new one.
        settings=replace(record.settings, refresh_serial=0, refresh=()),
        epoch=epoch,
        world_size=world_size,
        begun=False,
        state=RunState.CREATED,
        in_force=InForce(),
        gauges={},
    )
    return Change(opened, (Event(kind="started", text=f"start {epoch} with {world_size} ranks"),))


def reported(record: RunRecord, *, phase: str, step: int, in_force: InForce | None = None) -> Change:
    """Takes over where rank 0 says that the run stands and what it goes by. A start that has ended stays ended."""
    if record.state.ended:
        return Change(record)
    record, events = _obeyed(record, in_force, phase) if in_force is not None else (record, ())
    state = PHASES[phase]
    if not state.ended and record.settings.desired is Desired.STOPPED:
        state = RunState.STOPPING
    moved = replace(record, state=state, step=step, begun=True)
    if state is record.state:
        return Change(moved, events)
    kind = "returned" if record.state is RunState.LOST else state.value
    return Change(moved, (*events, Event(kind=kind, text=f"{record.state} -> {state} at step {step}")))


def _obeyed(record: RunRecord, in_force: InForce, phase: str) -> tuple[RunRecord, tuple[Event, ...]]:
    """Notes what the ranks go by, and at which step they took up what users had asked for."""
    events = list(_kept(record, in_force))
    newest = max((each.revision for each in in_force.obeyed), default=0)
    if newest > record.settings.revision:
        record = _ahead_of(record, newest, phase)
        text = (
            f"the ranks go by revision {newest}, of which this controller (with another file) has no record; what "
            "was set until then holds until the next change of a setting"
        )
        events.append(Event(kind="settings_unknown", text=text))
    for each in in_force.obeyed:
        if each.revision <= record.obeyed_revision:
            continue
        texts = [text for revision, text in record.asked if revision <= each.revision]
        what = (
            f"revision {each.revision} ({'; '.join(texts) or 'as before'}), agreed on by all ranks at step {each.step}"
        )
        if each.refused:
            text = f"{what}: the settings of the method stay as they were: {each.refused}"
            events.append(Event(kind="settings_refused", text=text))
            kept = {
                name: value for name, value in record.settings.changes.items() if in_force.values.get(name) == value
            }
            record = replace(record, settings=replace(record.settings, changes=kept))
        elif texts:
            events.append(Event(kind="settings_obeyed", text=what))
        record = replace(
            record,
            asked=tuple(asked for asked in record.asked if asked[0] > each.revision),
            obeyed_revision=each.revision,
            obeyed_step=each.step,
        )
    return replace(record, in_force=replace(in_force, obeyed=())), tuple(events)


def _kept(record: RunRecord, in_force: InForce) -> Iterator[Event]:
    """Tells, when a start begins, what users had changed in an earlier one, as its checkpoint has it."""
    kept = {name: in_force.values[name] for name in in_force.changed if name not in record.settings.changes}
    if kept and not record.in_force.values:
        yield Event(kind="settings_kept", text=tuning.kept(record.name, kept))


def _ahead_of(record: RunRecord, newest: int, phase: str) -> RunRecord:
    """Returns the record with what users asked for newer than `newest`, which the ranks obey; couriers drop older."""
    if not record.asked:
        wish = Desired.PAUSED if phase == "paused" else record.settings.desired  # else nobody could resume it
        return replace(record, settings=replace(record.settings, revision=newest, desired=wish))
    asked = tuple((revision + newest, text) for revision, text in record.asked)
    settings = replace(record.settings, revision=record.settings.revision + newest)
    return replace(record, settings=settings, asked=asked)


def silent(record: RunRecord, *, lease_seconds: float) -> Change:
    """Decides what becomes of a run whose ranks have all been silent for longer than the lease."""
    if record.state in (RunState.RUNNING, RunState.PAUSED) or (record.state is RunState.STOPPING and record.begun):
        text = f"no rank was heard of for {lease_seconds:g} s, last at step {record.step}; it was {record.state}"
        return Change(replace(record, state=RunState.LOST, live_workers=0), (Event(kind="lost", text=text),))
    if record.state is RunState.STOPPING:  # asked to stop before any rank had come, and none has
        text = f"stopped before it began: no rank came within {lease_seconds:g} s"
        return Change(replace(record, state=RunState.STOPPED), (Event(kind="stopped", text=text),))
    return Change(record)


def desired(record: RunRecord, wish: Desired, who: str) -> Change:
    """Notes that a run is to continue, to pause or to stop; asked for twice, it changes nothing.

    Raises:
        Refusal: FAILED_PRECONDITION: the run has ended, or is to end.
    """
    if wish is Desired.STOPPED and record.state.ended:
        return Change(record)
    _check_steerable(record)
    now = record.settings.desired
    if now is wish:
        return Change(record)
    if now is Desired.STOPPED:
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"run {record.name!r} is to stop, which can't be taken back; start it again when it has ended",
        )
    word = {Desired.RUNNING: "resume", Desired.PAUSED: "pause", Desired.STOPPED: "stop"}[wish]
    moved = _asked(record, word, desired=wish)
    if wish is Desired.STOPPED and record.state is not RunState.LOST:
        moved = replace(moved, state=RunState.STOPPING)
    return Change(moved, (_request(f"{word}_requested", word, moved, who),))


def tuned(record: RunRecord, changes: Mapping[str, Value | None], who: str) -> Change:
    """Notes new settings of the method, checked before (`kfdist.control.validation.check_changes`).

    Args:
        record: The run.
        changes: By name; None: as configured again.
        who: Who asks.

    Raises:
        Refusal: FAILED_PRECONDITION: the run has ended.
    """
    _check_steerable(record)
    before = record.settings.changes
    if changes.get("adoption") == "asap":
        changes = {"lag": None, **changes}
    changes = {name: value for name, value in changes.items() if name not in before or before[name] != value}
    if not changes:
        return Change(record)
    moved = _asked(record, _described(record, changes), changes={**before, **changes})
    events = []
    for name, value in changes.items():
        old = record.in_force.values.get(name, before.get(name))
        was = "as configured" if old is None else tuning.shown(name, old)
        now = "as configured" if value is None else tuning.shown(name, value)
        text = f"{who} set {name} from {was} to {now} at step {record.step} (revision {moved.settings.revision})"
        events.append(Event(kind="settings_changed", text=text))
    return Change(moved, tuple(events))


def checkpointed(record: RunRecord, who: str) -> Change:
    """Notes a request for a checkpoint.

    Raises:
        Refusal: FAILED_PRECONDITION: the run has ended.
    """
    _check_steerable(record)
    serial = record.settings.checkpoint_serial + 1
    moved = _asked(record, f"checkpoint {serial}", checkpoint_serial=serial)
    return Change(moved, (_request("checkpoint_requested", f"checkpoint {serial}", moved, who),))


def refreshed(record: RunRecord, groups: Sequence[GroupName], who: str) -> Change:
    """Notes a request for fresh inverses.

    Args:
        record: The run.
        groups: Of which groups; none: of all.
        who: Who asks.

    Raises:
        Refusal: FAILED_PRECONDITION: the run has ended.
    """
    _check_steerable(record)
    shown = ", ".join(groups[:SHOWN_GROUPS]) + (
        f" and {len(groups) - SHOWN_GROUPS} more" * (len(groups) > SHOWN_GROUPS)
    )
    what = f"refresh of {shown or 'all blocks'}"
    serial = record.settings.refresh_serial + 1
    moved = _asked(record, f"{what}, inverted at the step after", refresh_serial=serial, refresh=tuple(groups))
    return Change(moved, (_request("refresh_requested", what, moved, who),))


def replanned(record: RunRecord, text: str, who: str) -> Change:
    """Notes that the groups are dealt to owners anew.

    Raises:
        Refusal: FAILED_PRECONDITION: the run has ended.
    """
    _check_steerable(record)
    return Change(record, (Event(kind="replanned", text=f"{text}; asked for at step {record.step} by {who}"),))


def timestamp(time_ns: int) -> Timestamp:
    """Returns the message of a time in nanoseconds since 1970."""
    return Timestamp(seconds=time_ns // 10**9, nanos=time_ns % 10**9)


def _check_steerable(record: RunRecord) -> None:
    if record.state.ended:
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"run {record.name!r} has ended ({record.state}) at step {record.step}; only a new start moves it on",
        )


def _reset(record: RunRecord) -> RunRecord:
    # A new start's ranks count requests for checkpoints from 0 and must not take an old request for a new one.
    settings = replace(
        record.settings,
        revision=record.settings.revision + 1,
        desired=Desired.RUNNING,
        changes={},
        checkpoint_serial=0,
        refresh_serial=0,
        refresh=(),
    )
    return replace(record, settings=settings, asked=())


def _asked(record: RunRecord, text: str, **changed: Any) -> RunRecord:
    """Returns the record with new settings, which the ranks have yet to obey."""
    settings = replace(record.settings, revision=record.settings.revision + 1, **changed)
    return replace(record, settings=settings, asked=(*record.asked, (settings.revision, text))[-MOST_ASKED:])


def _request(kind: str, what: str, record: RunRecord, who: str) -> Event:
    text = f"{what} asked for at step {record.step} by {who} (revision {record.settings.revision})"
    return Event(kind=kind, text=text)


def _described(record: RunRecord, changes: Mapping[str, Value | None]) -> str:
    """Returns what users read of changes when the ranks have obeyed."""
    texts = []
    for name, value in changes.items():
        text = f"{name} {'as configured' if value is None else tuning.shown(name, value)}"
        if name in tuning.PERIODS:
            text += " from the step after"
        if name == "damping" and record.in_force.late_damping:
            text += f", which {', '.join(record.in_force.late_damping)} takes up with its next inversions"
        texts.append(text)
    return ", ".join(texts)
