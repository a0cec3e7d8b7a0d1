"""Settings that people changed, over a resume."""

from kfdist.comm.background import TableExchange
from kfdist.comm.communicator import Communicator
from kfdist.links.local import LocalLink
from kfdist.runtime.adopt.agreement import Agreement
from kfdist.types import Desired, RunSettings


class ToldLink(LocalLink):
    """Hears what the test says."""

    told = RunSettings()

    def settings(self) -> RunSettings:
        return self.told


def test_a_restored_damping_stays_until_somebody_sets_another() -> None:
    link = ToldLink()
    agreement = Agreement(TableExchange(Communicator(None)), link, 0, lambda step: 0.1)
    agreement.load_state_dict({"damping": 0.3})
    # A controller that opens a new start of an ended run says nothing on damping.
    link.told = RunSettings(revision=4, desired=Desired.RUNNING, damping=0.0, checkpoint_serial=0)
    agreement.obey(revision=4, stop=False)
    assert (agreement.settings.revision, agreement.settings.damping) == (4, 0.3)
    link.told = RunSettings(revision=5, damping=0.5)
    agreement.obey(revision=5, stop=False)
    assert agreement.settings.damping == 0.5
