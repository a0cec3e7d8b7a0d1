"""A controller killed at random under a stream of mutations loses none that it acknowledged, and applies none twice.

What it says afterwards is checked against a model: the history in its event log is one that the mutations could have
made, each of them once, and the settings are what that history ends with.
"""

import random
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from kfdist.control.client import ControlClient
from tests.support.controller import Member, address_of_its_own
from tests.support.killed_controllers import OWNERS, RUNS, Asked, Caller, KilledController

CALLERS = 4

STEERED = {
    "pause_requested": "pause",
    "resume_requested": "resume",
    "settings_changed": "damping",
    "refresh_requested": "refresh",
    "checkpoint_requested": "checkpoint",
}
"""Mutations of a run by the kinds of their events."""

ALWAYS = ("damping", "refresh", "checkpoint")
"""Those that change something each time; a run that is paused already isn't paused again."""


@pytest.mark.parametrize(
    "kills", [10, pytest.param(200, marks=[pytest.mark.chaos, pytest.mark.timeout(1800)])], ids=lambda kills: f"{kills}"
)
def test_killed_at_random_it_loses_nothing_and_applies_nothing_twice(tmp_path: Path, kills: int) -> None:
    draw = random.Random(kills)
    controller = KilledController(tmp_path, address_of_its_own())
    controller.start()
    with Member(controller.address) as member, ControlClient(controller.address) as client:
        for owner in OWNERS:
            member.register_owner(owner)
        for run in RUNS:
            client.create(run)
            member.register_worker(run)
            member.beat_worker(run, step=1)
            member.hang_up()
    watched: list[int] = []
    watching = threading.Thread(target=watch, args=(controller.address, watched), daemon=True)
    callers = [Caller(controller.address, seed) for seed in range(CALLERS)]
    for thread in (watching, *callers):
        thread.start()
    for _ in range(kills):
        time.sleep(draw.uniform(0.0, 0.3))
        controller.kill()
        controller.start()
    for caller in callers:
        caller.ended.set()
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive() and caller.fault is None, caller.fault
    asked = [each for caller in callers for each in caller.asked]
    assert len(asked) > 3 * kills
    with Member(controller.address) as member, ControlClient(controller.address) as client:
        for run in RUNS:
            check_run(run, [each for each in asked if each.run == run], member, client)
        check_owners(member, client)
        client.stop(RUNS[0])
        member.beat_worker(RUNS[0], step=2, phase="stopped")
        watching.join(60)
        last = client.get(RUNS[0]).revision
        assert watched == list(range(watched[0], last + 1)), "the watch has no gap and no repetition"
    controller.kill()


def watch(address: str, seen: list[int]) -> None:
    with ControlClient(address) as client:
        for run in client.watch(RUNS[0], from_revision=0, away_seconds=120):
            seen.append(run.revision)
            if run.state.ended:
                return


def check_run(run: str, asked: Sequence[Asked], member: Member, client: ControlClient) -> None:
    """Compares a run's log and settings with what was asked of it."""
    for each in asked:
        assert len(set(each.answers)) == 1, "a repeated request is answered as the first was"
    history = [
        (STEERED[event.kind], int(found.group(1)), event.text)
        for event in client.events(run)
        if event.kind in STEERED and (found := re.search(r"\(revision (\d+)\)", event.text))
    ]
    first = history[0][1]
    assert [revision for _, revision, _ in history] == list(range(first, first + len(history)))
    for kind in ALWAYS:
        acknowledged = sorted(each.revision for each in asked if each.kind == kind)
        assert acknowledged == [revision for event, revision, _ in history if event == kind], kind
    texts = {revision: text for _, revision, text in history}
    assert all(f"to {each.value:g} at" in texts[each.revision] for each in asked if each.kind == "damping")
    wishes, wish = {first - 1: "resume"}, "resume"
    for kind, revision, _ in history:
        assert kind != wish, "only a change is an event"
        wish = kind if kind in ("pause", "resume") else wish
        wishes[revision] = wish
    assert all(wishes[each.revision] == each.kind for each in asked if each.kind in ("pause", "resume"))
    settings = member.beat_worker(run, step=1).settings
    assert settings.revision == history[-1][1]
    assert settings.desired == ("paused" if wish == "pause" else "running")
    assert settings.checkpoint_serial == sum(kind == "checkpoint" for kind, _, _ in history)
    assert settings.refresh_serial == sum(kind == "refresh" for kind, _, _ in history)
    dampings = {each.revision: each.value for each in asked if each.kind == "damping"}
    assert settings.damping == dampings[max(dampings)]


def check_owners(member: Member, client: ControlClient) -> None:
    """The drained owner is as its last event says, and no event says what was so already."""
    logs = [[event.kind for event in client.events(run) if event.kind.endswith("drained")] for run in RUNS]
    assert logs[0] == logs[1]
    assert all(before != after for before, after in zip(["owner_undrained", *logs[0]], logs[0], strict=False))
    told = {owner.owner_id: owner.draining for owner in member.beat_worker(RUNS[0], step=1).owners}
    assert told == {OWNERS[0]: logs[0][-1:] == ["owner_drained"], OWNERS[1]: False}
