"""The rules of what users ask of a run: its record moves on, and its ranks obey at a step of which they tell.

Pure functions from a record to a `Change`, as in `run_rules`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import grpc

from kfdist.control.control_records import Change, Event, RunRecord, RunState
from kfdist.policies import tuning
from kfdist.rpc.status import Refusal
from kfdist.types import Desired, GroupName, Value

SHOWN_GROUPS = 8
"""Groups that an event names."""


MOST_ASKED = 64
"""Requests whose texts are kept until the ranks obey them."""


def desired(record: RunRecord, wish: Desired, who: str) -> Change:
    """Notes that a run is to continue, to pause or to stop; asked for twice, it changes nothing.

    Raises:
        Refusal: FAILED_PRECONDITION: the run has ended, or is to end.
    """
    if wish is Desired.STOPPED and record.state.ended:
        return Change(record)
    if record.settings.desired is wish and not record.state.ended:
        return Change(record)
    _check_steerable(record)
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
        Refusal: FAILED_PRECONDITION: the run has ended, or is to end.
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
        asked = name in before and (record.asked or before[name] is not None)  # maybe not in force yet
        old = before[name] if asked else record.in_force.values.get(name)
        was = "as configured" if old is None else tuning.shown(name, old)
        now = "as configured" if value is None else tuning.shown(name, value)
        text = f"{who} set {name} from {was} to {now} at step {record.step} (revision {moved.settings.revision})"
        events.append(Event(kind="settings_changed", text=text))
    return Change(moved, tuple(events))


def checkpointed(record: RunRecord, who: str) -> Change:
    """Notes a request for a checkpoint.

    Raises:
        Refusal: FAILED_PRECONDITION: the run has ended, or is to end.
    """
    _check_steerable(record)
    serial = record.settings.checkpoint_serial + 1
    moved = _asked(record, f"checkpoint {serial}", checkpoint_serial=serial)
    return Change(moved, (_request("checkpoint_requested", f"checkpoint {serial}", moved, who),))


def refreshed(record: RunRecord, groups: Sequence[GroupName], who: str) -> Change:
    """Notes a request for fresh inverses; it joins one that the ranks haven't obeyed yet.

    Args:
        record: The run.
        groups: Of which groups; none: of all.
        who: Who asks.

    Raises:
        Refusal: FAILED_PRECONDITION: the run has ended, or is to end.
    """
    _check_steerable(record)
    shown = ", ".join(groups[:SHOWN_GROUPS]) + (
        f" and {len(groups) - SHOWN_GROUPS} more" * (len(groups) > SHOWN_GROUPS)
    )
    what = f"refresh of {shown or 'all blocks'}"
    serial = record.settings.refresh_serial + 1
    if record.refresh_revision > record.obeyed_revision:  # ranks hear of the newest request alone
        groups = list(dict.fromkeys([*record.settings.refresh, *groups])) if record.settings.refresh and groups else []
    moved = _asked(record, f"{what}, inverted at the next step", refresh_serial=serial, refresh=tuple(groups))
    moved = replace(moved, refresh_revision=moved.settings.revision)
    return Change(moved, (_request("refresh_requested", what, moved, who),))


def replanned(record: RunRecord, text: str, who: str) -> Change:
    """Notes that the groups are dealt to owners anew.

    Raises:
        Refusal: FAILED_PRECONDITION: the run has ended, or is to end.
    """
    _check_steerable(record)
    return Change(record, (Event(kind="replanned", text=f"{text}; asked for at step {record.step} by {who}"),))


def _check_steerable(record: RunRecord) -> None:
    if record.state.ended:
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"run {record.name!r} has ended ({record.state}) at step {record.step}; only a new start moves it on",
        )
    if record.settings.desired is Desired.STOPPED:  # ranks that end would obey nothing that is asked from now on
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"run {record.name!r} is to stop, which can't be taken back; start it again when it has ended, "
            "and ask then",
        )


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
