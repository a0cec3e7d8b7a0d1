"""Settings that people changed, over a resume."""

from torch import nn

from kfdist.comm.background import TableExchange
from kfdist.comm.communicator import Communicator
from kfdist.links.local import LocalLink
from kfdist.runtime.adopt.agreement import Agreement
from kfdist.runtime.in_force import SettingsInForce
from kfdist.types import Desired, InForce, RunSettings
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
