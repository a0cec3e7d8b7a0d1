"""Settings that people changed, over a resume; and what the controller hears of a rank's end."""

from collections.abc import Sequence

import pytest
from torch import nn

from kfdist.comm.background import TableExchange
from kfdist.comm.communicator import Communicator
from kfdist.errors import Interrupted
from kfdist.links.local import LocalLink
from kfdist.runtime.adopt.agreement import Agreement
from kfdist.runtime.in_force import SettingsInForce
from kfdist.types import Desired, InForce, MetricSample, RunSettings
from tests.support.plans import planned


class ToldLink(LocalLink):
    """Hears what the test says, and keeps what the rank reports."""

    told = RunSettings()
    reported = InForce()

    def report(self, in_force: InForce) -> None:
        self.reported = in_force

    def settings(self) -> RunSettings:
        return self.told


def in_force() -> SettingsInForce:
    plan = planned(nn.Sequential(nn.Linear(4, 3)), "kfac-eigen", damping=0.1)
    return SettingsInForce(plan.settings, plan.groups)


def test_a_restored_damping_stays_until_somebody_sets_another() -> None:
    link = ToldLink()
    agreement = Agreement(TableExchange(Communicator(None)), link, 0, in_force())
    agreement.in_force.load_state_dict({"changes": {"damping": 0.3}})
    # A controller that opens a new start of an ended run says nothing on damping.
    for revision, changes, damping in ((4, {}, 0.3), (5, {"damping": 0.5}, 0.5), (6, {"damping": None}, 0.1)):
        link.told = RunSettings(revision=revision, desired=Desired.RUNNING, changes=changes)
        agreement.obey(revision=revision, stop=False)
        assert (agreement.settings.revision, agreement.in_force.damping(0)) == (revision, damping)


def test_what_is_obeyed_in_a_round_is_told_though_no_step_ends() -> None:
    link = ToldLink()
    agreement = Agreement(TableExchange(Communicator(None)), link, 0, in_force())
    link.told = RunSettings(revision=1, desired=Desired.PAUSED, changes={"damping": 0.5, "inverse_period": 7})
    agreement.round([])
    assert [obeyed.revision for obeyed in link.reported.obeyed] == [1]
    link.told = RunSettings(revision=2, desired=Desired.PAUSED, changes={"damping": 0.5})
    agreement.round([])
    assert [obeyed.revision for obeyed in link.reported.obeyed] == [1, 2]
    assert link.reported.values["damping"] == 0.5


class HeardLink(ToldLink):
    """Keeps the phases that the rank tells."""

    def __init__(self) -> None:
        super().__init__()
        self.phases: list[str] = []

    def beat(self, step: int, phase: str, samples: Sequence[MetricSample]) -> None:
        del step, samples
        self.phases.append(phase)


@pytest.mark.parametrize(
    ("told", "stop", "failed", "ends"),
    [
        (["running"], False, False, ["running", "finished"]),
        ([], True, False, ["stopped"]),
        (["paused"], False, True, ["paused", "failed"]),
        (["stopped"], False, False, ["stopped"]),
        (["finished"], True, False, ["finished"]),
        (["failed", "running"], False, False, ["failed", "running", "finished"]),
    ],
)
def test_the_end_is_told_once_by_whoever_knows_it(told: list[str], stop: bool, failed: bool, ends: list[str]) -> None:
    link = HeardLink()
    agreement = Agreement(TableExchange(Communicator(None)), link, 0, in_force())
    for phase in told:
        agreement.tell(3, phase)
    agreement.obey(revision=0, stop=stop)
    agreement.tell_end(3, failed=failed)
    agreement.tell_end(3, failed=failed)
    assert link.phases == ends


def test_a_rank_that_ends_after_a_wait_was_too_long_has_stopped_unless_it_goes_on() -> None:
    for goes_on, ends in ((False, "stopped"), (True, "finished")):
        link = HeardLink()
        agreement = Agreement(TableExchange(Communicator(None)), link, 0, in_force())
        with pytest.raises(Interrupted, match="outlasted"):
            agreement.round([], expired=True)
        if goes_on:
            agreement.table(3)
        agreement.tell_end(4, failed=False)
        assert link.phases == [ends]
