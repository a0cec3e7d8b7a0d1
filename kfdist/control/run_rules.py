"""The rules of a run's life, by what its ranks and the clock say: made known, started, obeying, ended, lost.

They are pure functions from a record to a `Change`: nothing here stores, sends or reads a clock. What users ask for is
in `steering`.
"""

from collections.abc import Iterator
from dataclasses import replace

from kfdist.control import steering
from kfdist.control.control_records import PHASES, Change, Event, RunRecord, RunState
from kfdist.policies import tuning
from kfdist.types import Desired, InForce


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

    A run that hadn't ended keeps its settings, so that ranks that crashed and restarted stay paused, and do what the
    last ones hadn't heard of. One that had ended gets them reset. Whether a refresh that was agreed on is
    lost, the first report tells.
    """
    if record.state.ended:
        record = _reset(record)
    if record.refresh_revision <= record.obeyed_revision:
        # The new start's ranks have seen no request for fresh inverses, and must not take an old one for a new one.
        record = replace(record, settings=replace(record.settings, refresh_serial=0, refresh=()))
    opened = replace(
        record,
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
    record, events = _refresh_lost(record, phase, step)
    if in_force is not None:
        record, told = _obeyed(record, in_force, phase)
        events += told
    state = PHASES[phase]
    if not state.ended and record.settings.desired is Desired.STOPPED:
        state = RunState.STOPPING
    if state is RunState.STOPPED:
        record, told = _stop_obeyed(record, step)
        events += told
    moved = replace(record, state=state, step=step, begun=True)
    if state is record.state:
        return Change(moved, events)
    kind = "returned" if record.state is RunState.LOST else state.value
    events = (*events, Event(kind=kind, text=f"{record.state} -> {state} at step {step}"))
    return _ended(moved, events) if state.ended else Change(moved, events)


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
        if record.obeyed_revision < record.refresh_revision <= each.revision:
            record = replace(record, refresh_step=each.step, refreshed=record.settings.refresh)
        record = replace(
            record,
            asked=tuple(asked for asked in record.asked if asked[0] > each.revision),
            obeyed_revision=each.revision,
            obeyed_step=each.step,
        )
    return replace(record, in_force=replace(in_force, obeyed=())), tuple(events)


def _refresh_lost(record: RunRecord, phase: str, step: int) -> tuple[RunRecord, tuple[Event, ...]]:
    """Asks anew, by a start's first report, for a refresh that the start before it had agreed on and lost.

    A checkpoint of after the step of the agreement has it, made or still to be made; one of that step or before hasn't,
    and the ranks do that step again without it.
    """
    state = PHASES[phase]
    if record.begun or state is RunState.FAILED or step > record.refresh_step:
        return record, ()
    text = (
        f"the refresh agreed on at step {record.refresh_step} was lost with the ranks: start {record.epoch} goes on "
        f"from step {step}"
    )
    record = replace(record, step=step, refresh_step=-1)
    if state.ended or record.settings.desired is Desired.STOPPED:
        return record, (Event(kind="refresh_lost", text=f"{text} and stops; ask the next one"),)
    again = steering.refreshed(record, record.refreshed, "the controller")
    return again.record, (Event(kind="refresh_lost", text=f"{text}, and it is asked for anew"), *again.events)


def _stop_obeyed(record: RunRecord, step: int) -> tuple[RunRecord, tuple[Event, ...]]:
    """Tells that the ranks have obeyed a stop; any rank may have heard of it first, and rank 0 not of its revision."""
    stop = next((revision for revision, text in record.asked if text == "stop"), None)
    if stop is None:
        return record, ()
    text = f"revision {stop} (stop), agreed on by all ranks at step {step}"
    left = tuple(asked for asked in record.asked if asked[0] != stop)
    obeyed = replace(record, asked=left, obeyed_revision=max(stop, record.obeyed_revision), obeyed_step=step)
    return obeyed, (Event(kind="settings_obeyed", text=text),)


def _ended(record: RunRecord, events: tuple[Event, ...]) -> Change:
    """Tells what was asked of a start that has ended and that none of its steps did; nothing is dropped unsaid."""
    if record.state is not RunState.FAILED and record.refresh_step >= max(record.step - 1, 0):
        text = (
            f"the refresh agreed on at step {record.refresh_step} is left to the next start: this one made no step "
            "after it"
        )
        events = (*events, Event(kind="refresh_left", text=text))
        # It is in this start's checkpoint, and lost only with that.
        record = replace(record, refresh_step=record.step - 1)
    if record.asked:
        told = ", ".join(f"revision {revision} ({text})" for revision, text in record.asked)
        how = f"the run ended ({record.state}) at step {record.step} before its ranks took it up; ask its next start"
        events = (*events, Event(kind="not_obeyed", text=f"{told}: {how}"))
    return Change(replace(record, asked=()), events)


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
    refresh_revision = record.refresh_revision and record.refresh_revision + newest
    return replace(record, settings=settings, asked=asked, refresh_revision=refresh_revision)


def silent(record: RunRecord, *, lease_seconds: float) -> Change:
    """Decides what becomes of a run whose ranks have all been silent for longer than the lease."""
    if record.state in (RunState.RUNNING, RunState.PAUSED) or (record.state is RunState.STOPPING and record.begun):
        text = f"no rank was heard of for {lease_seconds:g} s, last at step {record.step}; it was {record.state}"
        return Change(replace(record, state=RunState.LOST, live_workers=0), (Event(kind="lost", text=text),))
    if record.state is RunState.STOPPING:  # asked to stop before any rank had come, and none has
        text = f"stopped before it began: no rank came within {lease_seconds:g} s"
        left = tuple(asked for asked in record.asked if asked[1] != "stop")
        stopped = replace(record, state=RunState.STOPPED, asked=left)
        return _ended(stopped, (Event(kind="stopped", text=text),))
    return Change(record)


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
    return replace(record, settings=settings, asked=(), refresh_revision=0)
