from collections.abc import Callable, Iterator

import pytest

from kfdist.links.link import LinkContext
from kfdist.links.rank.remote import RemoteLink, RemoteOptions
from kfdist.owner.owner import Owner, OwnerOptions
from tests.support.controller import ControllerThread
from tests.support.jobs import context
from tests.support.waits import eventually

StartLink = Callable[..., RemoteLink]


@pytest.fixture(scope="module")
def controller(tmp_path_factory) -> Iterator[ControllerThread]:
    with ControllerThread(tmp_path_factory.mktemp("controller") / "control.sqlite") as running:
        yield running


@pytest.fixture(scope="module")
def owners(controller: ControllerThread) -> Iterator[list[Owner]]:
    """Two owners in threads of this process; module-wide, because each loads torch in a process of its own."""
    made = [Owner(OwnerOptions(owner_id=f"owner-{i}", controller=controller.address)) for i in range(2)]
    eventually(lambda: [owner.status()["registered"] for owner in made], all, seconds=60)
    yield made
    for owner in made:
        owner.close()


@pytest.fixture
def start_link() -> Iterator[StartLink]:
    """Starts links and ends them with the test."""
    started: list[RemoteLink] = []

    def start(address: str, *, as_told: LinkContext | None = None, **options) -> RemoteLink:
        link = RemoteLink(address, options=RemoteOptions(**options))
        started.append(link)
        link.start(as_told or context())
        return link

    yield start
    for link in started:
        link.close()
