"""The rules of a run's record, under any order of events: ends stay ends, stops stay stops, revisions never go back."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kfdist.control import run_rules
from kfdist.control.run_rules import PHASES, Change, RunRecord, RunState
from kfdist.rpc.status import Refusal
from kfdist.types import Desired


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
            self.apply(run_rules.desired(before, wish, "ada"))
        except Refusal as refusal:
            assert wish is not Desired.STOPPED
            assert before.state.ended or before.settings.desired is Desired.STOPPED
            assert before.name in str(refusal)
        else:
            assert before.state.ended or self.record.settings.desired is wish

    @precondition(lambda self: not self.record.state.ended)
    @rule(damping=st.floats(1e-9, 1e3))
    def damp_and_checkpoint(self, damping: float) -> None:
        serial = self.record.settings.checkpoint_serial
        self.apply(run_rules.tuned(self.record, {"damping": damping}, "ada"))
        self.apply(run_rules.checkpointed(self.record, "ada"))
        assert self.record.settings.changes["damping"] == damping
        assert self.record.settings.checkpoint_serial == serial + 1

    @precondition(lambda self: self.record.state.ended)
    @rule()
    def refuse_to_steer_what_has_ended(self) -> None:
        for steer in (
            lambda r: run_rules.tuned(r, {"damping": 1.0}, "ada"),
            lambda r: run_rules.checkpointed(r, "ada"),
        ):
            with pytest.raises(Refusal, match="has ended"):
                steer(self.record)

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
