"""What the controller remembers of runs and owners, and the rules by which a run's record moves.

The rules are pure functions from a record to a `Change`; nothing here stores, sends or reads a clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

import grpc
from pydantic import ConfigDict

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
    "waiting": RunState.RUNNING,  # an agreed wait is part of running: nobody has to act
    "paused": RunState.PAUSED,
    "finished": RunState.FINISHED,
    "stopped": RunState.STOPPED,
    "failed": RunState.FAILED,
}
"""What a rank may say of itself, and what rank 0's word makes of the run."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run.

    Attributes:
        name: Its name.
        directory: Where its files are, for people.
        total_steps: How many steps it is to make; 0: not known.
        created_ns: When it was made known, nanoseconds since 1970.
        epoch: Its newest start.
        world_size: How many ranks its newest start has; 0 before the first has registered.
        begun: Whether a rank of its newest start has reported.
        state: Where it stands.
        step: The step that rank 0 last reported.
        settings: What people want of it.
        live_workers: Ranks heard of within the lease.
        live_owners: Owners heard of within the lease.
        gauges: Rank 0's gauges by metric name.
        revision: Moves by one at every change of this record.
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


@dataclass(frozen=True, kw_only=True)
class OwnerRecord:
    """One owner, as it registered.

    Attributes:
        owner_id: Its name, kept over restarts.
        address: Where its InversionService listens.
        fingerprint: What its numbers depend on.
        restarts: How often it was started before.
        pid: Its process.
        live: Whether it was heard of within the lease when this was written.
    """

    owner_id: str
    address: str
    fingerprint: str = ""
    restarts: int = 0
    pid: int = 0
    live: bool = True


@dataclass(frozen=True, kw_only=True)
class AssignmentRecord:
    """Who inverts what in a run.

    Attributes:
        run: The run.
        policy: How groups are dealt (kfdist.policies.assignment).
        groups: The run's groups, as rank 0 registered them.
        owner_by_group: The owner of each group; empty without owners.
        revision: Moves whenever `owner_by_group` does.
    """

    run: str
    policy: str = "round_robin"
    groups: tuple[GroupSpec, ...] = ()
    owner_by_group: Mapping[GroupName, str] = field(default_factory=dict)
    revision: int = 0


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened in a run: a word for programs and a sentence for people."""

    kind: str
    text: str


@dataclass(frozen=True)
class Change:
    """A run's record after something happened, and what is to be told of it."""

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
    """Makes a run known that a controller was started for; one that is known keeps its state and its settings."""
    if record is None:
        return created(None, name=name, directory=directory, total_steps=total_steps, now_ns=now_ns)
    return Change(replace(record, directory=directory, total_steps=total_steps))


def started(record: RunRecord, *, epoch: int, world_size: int) -> Change:
    """Opens the start `epoch` of a run, when its first rank registers.

    What people asked of a run that hadn't ended still holds for its new start (ranks that crashed and were started
    again stay paused); what they asked of one that had ended doesn't.
    """
    if record.state.ended:
        record = _reset(record)
    opened = replace(record, epoch=epoch, world_size=world_size, begun=False, state=RunState.CREATED, gauges={})
    return Change(opened, (Event(kind="started", text=f"start {epoch} with {world_size} ranks"),))


def reported(record: RunRecord, *, phase: str, step: int) -> Change:
    """Takes rank 0's word for where the run stands. A start that has ended stays ended."""
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
    """Draws the conclusion when no rank was heard of for longer than the lease."""
    if record.state in (RunState.RUNNING, RunState.PAUSED) or (record.state is RunState.STOPPING and record.begun):
        text = f"no rank heard of for {lease_seconds:g} s, last at step {record.step}; it was {record.state}"
        return Change(replace(record, state=RunState.LOST, live_workers=0), (Event(kind="lost", text=text),))
    if record.state is RunState.STOPPING:  # asked to stop before any rank had come, and none has
        text = f"stopped before it began: no rank came within {lease_seconds:g} s"
        return Change(replace(record, state=RunState.STOPPED), (Event(kind="stopped", text=text),))
    return Change(record)


def desired(record: RunRecord, wish: Desired) -> Change:
    """Notes that people want a run to go on, to wait or to end; asked for twice, it changes nothing.

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
    """Notes that a checkpoint is wanted.

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


def _check_steerable(record: RunRecord) -> None:
    if record.state.ended:
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"run {record.name!r} has ended ({record.state}) at step {record.step}; only a new start moves it on",
        )


def _reset(record: RunRecord) -> RunRecord:
    # A new start's ranks count requests for checkpoints from 0, and must not take an old request for theirs.
    settings = _next(record.settings, desired=Desired.RUNNING, damping=0.0, checkpoint_serial=0)
    return replace(record, settings=settings)


def _next(settings: RunSettings, **changed: Desired | float | int) -> RunSettings:
    return replace(settings, revision=settings.revision + 1, **changed)
