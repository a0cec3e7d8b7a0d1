"""The controller's records of runs and owners, and the rules by which a run's record changes.

The rules are pure functions from a record to a `Change`: nothing here stores, sends or reads a clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import ConfigDict

from kfdist.rpc._generated.kfdist.v1 import run_pb2
from kfdist.rpc.status import Refusal
from kfdist.types import Desired, GroupName, GroupSpec, RunSettings


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
    """

    owner_id: str
    address: str
    fingerprint: str = ""
    restarts: int = 0
    pid: int = 0
    live: bool = True


@dataclass(frozen=True, kw_only=True)
class AssignmentRecord:
    """Which owner inverts which group of a run.

    Attributes:
        run: The run.
        policy: The rule that deals groups (kfdist.policies.assignment).
        groups: The run's groups, as rank 0 registered them.
        owner_by_group: The owner of each group; empty without owners.
        revision: Rises whenever `owner_by_group` changes.
    """

    run: str
    policy: str = "round_robin"
    groups: tuple[GroupSpec, ...] = ()
    owner_by_group: Mapping[GroupName, str] = field(default_factory=dict)
    revision: int = 0


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
        _reset(record), directory=directory, total_steps=total_steps, state=RunState.CREATED, begun=False, gauges={}
    )
    return Change(reset, (Event(kind="created", text=f"run {name} is about to start again; settings as configured"),))


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
    opened = replace(record, epoch=epoch, world_size=world_size, begun=False, state=RunState.CREATED, gauges={})
    return Change(opened, (Event(kind="started", text=f"start {epoch} with {world_size} ranks"),))


def reported(record: RunRecord, *, phase: str, step: int) -> Change:
    """Takes over where rank 0 says that the run stands. A start that has ended stays ended."""
    if record.state.ended:
        return Change(record)
    state = PHASES[phase]
    if not state.ended and record.settings.desired is Desired.STOPPED:
        state = RunState.STOPPING
    moved = replace(record, state=state, step=step, begun=True)
    if state is record.state:
        return Change(moved)
    kind = "returned" if record.state is RunState.LOST else state.value
    return Change(moved, (Event(kind=kind, text=f"{record.state} -> {state} at step {step}"),))


def silent(record: RunRecord, *, lease_seconds: float) -> Change:
    """Decides what becomes of a run whose ranks have all been silent for longer than the lease."""
    if record.state in (RunState.RUNNING, RunState.PAUSED) or (record.state is RunState.STOPPING and record.begun):
        text = f"no rank was heard of for {lease_seconds:g} s, last at step {record.step}; it was {record.state}"
        return Change(replace(record, state=RunState.LOST, live_workers=0), (Event(kind="lost", text=text),))
    if record.state is RunState.STOPPING:  # asked to stop before any rank had come, and none has
        text = f"stopped before it began: no rank came within {lease_seconds:g} s"
        return Change(replace(record, state=RunState.STOPPED), (Event(kind="stopped", text=text),))
    return Change(record)


def desired(record: RunRecord, wish: Desired) -> Change:
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
    moved = replace(record, settings=_next(record.settings, desired=wish))
    if wish is Desired.STOPPED and record.state is not RunState.LOST:
        moved = replace(moved, state=RunState.STOPPING)
    word = {Desired.RUNNING: "resume", Desired.PAUSED: "pause", Desired.STOPPED: "stop"}[wish]
    return Change(moved, (Event(kind=f"{word}_requested", text=f"{word} asked for at step {record.step}"),))


def damped(record: RunRecord, damping: float) -> Change:
    """Notes a new damping.

    Raises:
        Refusal: FAILED_PRECONDITION: the run has ended.
    """
    _check_steerable(record)
    if damping == record.settings.damping:
        return Change(record)
    text = f"damping {damping:g} asked for at step {record.step}"
    return Change(
        replace(record, settings=_next(record.settings, damping=damping)), (Event(kind="settings_changed", text=text),)
    )


def checkpointed(record: RunRecord) -> Change:
    """Notes a request for a checkpoint.

    Raises:
        Refusal: FAILED_PRECONDITION: the run has ended.
    """
    _check_steerable(record)
    serial = record.settings.checkpoint_serial + 1
    text = f"checkpoint {serial} asked for at step {record.step}"
    return Change(
        replace(record, settings=_next(record.settings, checkpoint_serial=serial)),
        (Event(kind="checkpoint_requested", text=text),),
    )


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
    settings = _next(record.settings, desired=Desired.RUNNING, damping=0.0, checkpoint_serial=0)
    return replace(record, settings=settings)


def _next(settings: RunSettings, **changed: Desired | float | int) -> RunSettings:
    return replace(settings, revision=settings.revision + 1, **changed)
