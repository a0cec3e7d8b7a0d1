"""The rules of a run's record, under any order of events: ends stay ends, stops stay stops, revisions never go back."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kfdist.control import run_rules, steering, validation
from kfdist.control.control_records import PHASES, Change, RunRecord, RunState
from kfdist.errors import ConfigError
from kfdist.links.socket_messages import NewSettings, encode
from kfdist.rpc.status import Refusal
from kfdist.types import Desired, InForce, Obeyed, RunSettings


class RunRules(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.record = self.create(None)
        self.settings_revision = 0

    @staticmethod
    def create(record: RunRecord | None) -> RunRecord:
        return run_rules.created(record, name="r", directory="", total_steps=9, now_ns=1).record

    def apply(self, change: Change) -> None:
        before, self.record = self.record, change.record
        if before.settings != self.record.settings:
            assert self.record.settings.revision > before.settings.revision
        if before.state != self.record.state:
            assert change.events, "users learn of every change of state"

    @rule()
    def create_again(self) -> None:
        self.record = self.create(self.record)
        assert self.record.settings.desired is Desired.RUNNING

    @rule(world_size=st.integers(1, 4))
    def start(self, world_size: int) -> None:
        before = self.record
        self.apply(run_rules.started(before, epoch=before.epoch + 1, world_size=world_size))
        kept = self.record.settings.desired is before.settings.desired
        assert kept or before.state.ended
        assert not self.record.state.ended

    @rule(phase=st.sampled_from(sorted(PHASES)), step=st.integers(0, 9))
    def report(self, phase: str, step: int) -> None:
        before = self.record
        self.apply(run_rules.reported(before, phase=phase, step=step))
        if before.state.ended:
            assert self.record == before
        elif before.settings.desired is Desired.STOPPED:
            assert self.record.state is RunState.STOPPING or self.record.state.ended
        else:
            assert self.record.state is PHASES[phase]

    @rule()
    def fall_silent(self) -> None:
        before = self.record
        self.apply(run_rules.silent(before, lease_seconds=10))
        assert self.record.state is before.state or self.record.state in (RunState.LOST, RunState.STOPPED)
        if before.state.ended or before.state is RunState.CREATED:
            assert self.record == before

    @rule(wish=st.sampled_from(Desired))
    def want(self, wish: Desired) -> None:
        before = self.record
        try:
            self.apply(steering.desired(before, wish, "ada"))
        except Refusal as refusal:
            assert wish is not Desired.STOPPED
            assert before.state.ended or before.settings.desired is Desired.STOPPED
            assert before.name in str(refusal)
        else:
            assert before.state.ended or self.record.settings.desired is wish

    @precondition(lambda self: self.steerable)
    @rule(damping=st.floats(1e-9, 1e3))
    def damp_and_checkpoint(self, damping: float) -> None:
        serial = self.record.settings.checkpoint_serial
        self.apply(steering.tuned(self.record, {"damping": damping}, "ada"))
        self.apply(steering.checkpointed(self.record, "ada"))
        assert self.record.settings.changes["damping"] == damping
        assert self.record.settings.checkpoint_serial == serial + 1

    @property
    def steerable(self) -> bool:
        return not self.record.state.ended and self.record.settings.desired is not Desired.STOPPED

    @precondition(lambda self: not self.steerable)
    @rule()
    def refuse_to_steer_what_ends(self) -> None:
        for steer in (
            lambda r: steering.tuned(r, {"damping": 1.0}, "ada"),
            lambda r: steering.checkpointed(r, "ada"),
            lambda r: steering.refreshed(r, ["0"], "ada"),
            lambda r: steering.replanned(r, "dealt", "ada"),
        ):
            with pytest.raises(Refusal, match="has ended" if self.record.state.ended else "is to stop"):
                steer(self.record)

    @invariant()
    def nobody_is_asked_any_more_once_a_run_has_ended(self) -> None:
        assert not (self.record.state.ended and self.record.asked)

    @invariant()
    def settings_never_go_back(self) -> None:
        assert self.record.settings.revision >= self.settings_revision
        self.settings_revision = self.record.settings.revision


TestRunRules = RunRules.TestCase
TestRunRules.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_announcing_keeps_what_is_known():
    record = run_rules.started(RunRules.create(None), epoch=3, world_size=2).record
    record = run_rules.reported(record, phase="running", step=5).record
    again = run_rules.announced(record, name="r", directory="/new", total_steps=7, now_ns=2)
    assert again.events == ()
    assert (again.record.state, again.record.epoch, again.record.step) == (RunState.RUNNING, 3, 5)
    assert (again.record.directory, again.record.total_steps) == ("/new", 7)


def test_a_run_prepared_for_its_next_start_goes_by_nothing_yet():
    record = run_rules.started(RunRules.create(None), epoch=1, world_size=1).record
    record = run_rules.reported(record, phase="finished", step=5, in_force=InForce(values={"damping": 0.1})).record
    assert record.in_force.values
    assert RunRules.create(record).in_force == InForce()


@pytest.mark.parametrize("asked_before", [False, True])
def test_ranks_that_are_ahead_of_a_new_file_obey_what_is_asked_of_them(asked_before: bool):
    record = run_rules.started(RunRules.create(None), epoch=1, world_size=1).record
    if asked_before:
        record = steering.tuned(record, {"damping": 0.5}, "ada").record
    told = InForce(obeyed=(Obeyed(revision=4, step=1), Obeyed(revision=5, step=2)))
    change = run_rules.reported(record, phase="running", step=3, in_force=told)
    assert change.events[0].kind == "settings_unknown" and "revision 5" in change.events[0].text
    assert not any(event.kind == "settings_obeyed" for event in change.events)
    record = change.record if asked_before else steering.tuned(change.record, {"damping": 0.5}, "ada").record
    assert (record.settings.revision, record.obeyed_revision, len(record.asked)) == (6, 5, 1)
    assert record.refresh_revision == 0
    record = run_rules.reported(record, phase="running", step=9, in_force=InForce(obeyed=(Obeyed(revision=6, step=8),)))
    assert record.events[-1].text == "revision 6 (damping 0.5), agreed on by all ranks at step 8"
    assert all(event.kind != "settings_unknown" for event in record.events)


def test_a_refresh_that_ranks_ahead_of_a_new_file_have_yet_to_hear_of_stays_one():
    record = steering.refreshed(running(), [], "ada").record
    record = run_rules.reported(record, phase="running", step=4, in_force=InForce(obeyed=(Obeyed(revision=5, step=4),)))
    again = run_rules.started(record.record, epoch=2, world_size=2).record
    assert (again.settings.revision, again.refresh_revision, again.settings.refresh_serial) == (6, 6, 1)


def test_a_paused_run_that_is_ahead_of_a_new_file_can_be_resumed():
    record = run_rules.started(RunRules.create(None), epoch=1, world_size=1).record
    told = InForce(obeyed=(Obeyed(revision=5, step=2),))
    record = run_rules.reported(record, phase="paused", step=3, in_force=told).record
    record = steering.desired(record, Desired.RUNNING, "ada").record
    assert (record.settings.revision, record.settings.desired) == (6, Desired.RUNNING)


@pytest.mark.parametrize("heard", [(), (Obeyed(revision=1, step=7),)], ids=["any rank", "rank 0"])
def test_a_stop_is_obeyed_at_a_named_step_whatever_rank_heard_of_it(heard: tuple[Obeyed, ...]):
    record = run_rules.started(RunRules.create(None), epoch=1, world_size=2).record
    record = run_rules.reported(record, phase="running", step=3).record
    record = steering.desired(record, Desired.STOPPED, "ada").record
    ended = run_rules.reported(record, phase="stopped", step=7, in_force=InForce(obeyed=heard))
    assert [event.text for event in ended.events] == [
        "revision 1 (stop), agreed on by all ranks at step 7",
        "stopping -> stopped at step 7",
    ]
    assert (ended.record.asked, ended.record.obeyed_revision, ended.record.obeyed_step) == ((), 1, 7)


def running(step: int = 3) -> RunRecord:
    record = run_rules.started(RunRules.create(None), epoch=1, world_size=2).record
    return run_rules.reported(record, phase="running", step=step).record


@pytest.mark.parametrize("phase", ["finished", "stopped", "failed"])
def test_what_a_run_that_ends_has_not_obeyed_is_told(phase: str):
    record = steering.tuned(running(), {"damping": 0.5}, "ada").record
    record = steering.checkpointed(record, "ada").record
    ended = run_rules.reported(record, phase=phase, step=9)
    assert [event.text for event in ended.events if event.kind == "not_obeyed"] == [
        f"revision 1 (damping 0.5), revision 2 (checkpoint 1): the run ended ({phase}) at step 9 before its ranks "
        "took it up; ask its next start"
    ]


@pytest.mark.parametrize(
    ("phase", "step", "is_left"),
    [("stopped", 8, True), ("finished", 8, True), ("stopped", 7, True), ("stopped", 9, False), ("failed", 8, False)],
)
def test_a_refresh_that_no_step_has_made_is_left_to_the_next_start_and_that_is_told(
    phase: str, step: int, is_left: bool
):
    record = steering.refreshed(running(), ["0"], "ada").record
    told = InForce(obeyed=(Obeyed(revision=1, step=7),))
    ended = run_rules.reported(record, phase=phase, step=step, in_force=told)
    texts = [event.text for event in ended.events if event.kind == "refresh_left"]
    assert len(texts) == is_left and all("the refresh agreed on at step 7 is left to" in text for text in texts)
    assert not any(event.kind == "not_obeyed" for event in ended.events)


def test_a_refresh_that_nobody_heard_of_is_for_the_next_start_after_a_crash_and_is_made_once():
    record = steering.refreshed(running(), ["0"], "ada").record
    again = run_rules.started(record, epoch=2, world_size=2).record
    assert (again.settings.refresh_serial, again.settings.refresh) == (1, ("0",))
    heard = run_rules.reported(again, phase="running", step=4, in_force=InForce(obeyed=(Obeyed(revision=1, step=4),)))
    third = run_rules.started(heard.record, epoch=3, world_size=2).record
    assert (third.settings.refresh_serial, third.settings.refresh) == (0, ())


def agreed_refresh(phase: str = "running") -> RunRecord:
    """A run whose ranks agreed on a refresh of block 0 at step 7, and did or ended as `phase` says."""
    record = steering.refreshed(running(), ["0"], "ada").record
    told = InForce(obeyed=(Obeyed(revision=1, step=7),))
    return run_rules.reported(record, phase=phase, step=8, in_force=told).record


def of_refreshes(change: Change) -> list[str]:
    return [event.text for event in change.events if event.kind.startswith("refresh_")]


@pytest.mark.parametrize("by_hand", [False, True], ids=["started again", "made ready for another start"])
@pytest.mark.parametrize(("step", "is_lost"), [(3, True), (7, True), (8, False)])
def test_a_refresh_that_is_lost_with_all_ranks_is_told_and_asked_for_anew(step: int, is_lost: bool, by_hand: bool):
    record = run_rules.silent(agreed_refresh(), lease_seconds=10).record
    record = RunRules.create(record) if by_hand else record
    record = run_rules.started(record, epoch=2, world_size=2).record
    assert (record.settings.refresh_serial, record.settings.refresh) == (0, ())
    revision = record.settings.revision + 1
    change = run_rules.reported(record, phase="running", step=step)
    assert of_refreshes(change) == is_lost * [
        f"the refresh agreed on at step 7 was lost with the ranks: start 2 goes on from step {step}, and it is asked "
        "for anew",
        f"refresh of 0 asked for at step {step} by the controller (revision {revision})",
    ]
    settings = change.record.settings
    assert (settings.refresh_serial, settings.refresh) == ((1, ("0",)) if is_lost else (0, ()))
    if is_lost:
        told = InForce(obeyed=(Obeyed(revision=revision, step=step + 1),))
        obeyed = run_rules.reported(change.record, phase="running", step=step + 2, in_force=told)
        what = f"revision {revision} (refresh of 0, inverted at the next step), agreed on by all ranks at step"
        assert [event.text for event in obeyed.events] == [f"{what} {step + 1}"]
        assert obeyed.record.refresh_step == step + 1
    else:
        assert run_rules.reported(change.record, phase="running", step=step + 1).events == ()


def test_a_lost_refresh_is_told_where_the_next_start_stops_and_waits_for_another_where_it_fails():
    lost = run_rules.silent(agreed_refresh(), lease_seconds=10).record
    stopping = run_rules.started(steering.desired(lost, Desired.STOPPED, "ada").record, epoch=2, world_size=2).record
    text = "the refresh agreed on at step 7 was lost with the ranks: start 2 goes on from step 3 and stops; ask the"
    assert of_refreshes(run_rules.reported(stopping, phase="running", step=3)) == [f"{text} next one"]
    failed = run_rules.reported(run_rules.started(lost, epoch=2, world_size=2).record, phase="failed", step=3)
    assert of_refreshes(failed) == []
    third = run_rules.started(failed.record, epoch=3, world_size=2).record
    assert len(of_refreshes(run_rules.reported(third, phase="running", step=3))) == 2


def test_a_refresh_that_is_left_to_the_next_start_is_lost_with_its_checkpoint_alone():
    again = run_rules.started(agreed_refresh("stopped"), epoch=2, world_size=2).record
    assert of_refreshes(run_rules.reported(again, phase="running", step=8)) == []
    assert len(of_refreshes(run_rules.reported(again, phase="running", step=5))) == 2


def test_a_second_request_before_the_ranks_have_heard_of_the_first_is_for_both():
    both = steering.refreshed(steering.refreshed(running(), ["0"], "ada").record, ["1", "0"], "ben").record
    assert (both.settings.refresh_serial, both.settings.refresh) == (2, ("0", "1"))
    assert steering.refreshed(both, [], "ada").record.settings.refresh == ()
    everything = steering.refreshed(running(), [], "ada").record
    assert steering.refreshed(everything, ["1"], "ben").record.settings.refresh == ()
    assert steering.refreshed(agreed_refresh(), ["1"], "ben").record.settings.refresh == ("1",)


def test_the_log_says_from_which_value_also_where_that_one_is_not_in_force_yet():
    told = InForce(values={"damping": 0.03})
    record = run_rules.reported(running(), phase="running", step=4, in_force=told).record
    record = steering.tuned(record, {"damping": 0.04}, "ada").record
    change = steering.tuned(record, {"damping": None}, "ada")
    assert change.events[0].text == "ada set damping from 0.04 to as configured at step 4 (revision 2)"
    change = steering.tuned(change.record, {"damping": 0.1}, "ada")
    assert change.events[0].text == "ada set damping from as configured to 0.1 at step 4 (revision 3)"


def test_groups_that_match_fit_in_the_message_to_the_ranks():
    known = [f"model.layers.{i}.attention.projection" for i in range(5000)]
    assert validation.matching_groups(["*"], known) == validation.matching_groups([], known) == []
    few = validation.matching_groups(["model.layers.4*"], known[:800])
    assert len(few) == 111 and encode(NewSettings(settings=RunSettings(refresh=tuple(few))))
    with pytest.raises(
        ConfigError, match=r"groups: 1111 of the 5000 groups of the run match, more names than .* for all"
    ):
        validation.matching_groups(["model.layers.4*"], known)
