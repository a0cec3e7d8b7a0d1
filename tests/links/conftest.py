"""What links of a rank lead to. xdist's process that only hands tests out reads this file, too, and needs no torch."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from tests.support.waits import eventually

if TYPE_CHECKING:
    from kfdist.links.link import LinkContext
    from kfdist.links.rank.remote import RemoteLink
    from kfdist.owner.owner import Owner
    from tests.support.controller import ControllerThread

StartLink = Callable[..., "RemoteLink"]


@pytest.fixture(scope="module")
def controller(tmp_path_factory) -> Iterator["ControllerThread"]:
    from tests.support.controller import ControllerThread

    with ControllerThread(tmp_path_factory.mktemp("controller") / "control.sqlite") as running:
        yield running


@pytest.fixture(scope="module")
def owners(controller: "ControllerThread") -> Iterator[list["Owner"]]:
    """Two owners in threads of this process; module-wide, because each loads torch in a process of its own."""
    from kfdist.owner.owner import Owner, OwnerOptions

    made = [Owner(OwnerOptions(owner_id=f"owner-{i}", controller=controller.address)) for i in range(2)]
    eventually(lambda: [owner.status()["registered"] for owner in made], all, seconds=60)
    yield made
    for owner in made:
        owner.close()


@pytest.fixture
def start_link() -> Iterator[StartLink]:
    """Starts links and ends them with the test."""
    from kfdist.links.rank.remote import RemoteLink, RemoteOptions
    from tests.support.jobs import context

    started: list[RemoteLink] = []

    def start(address: str, *, as_told: "LinkContext | None" = None, **options) -> RemoteLink:
        link = RemoteLink(address, options=RemoteOptions(**options))
        started.append(link)
        link.start(as_told or context())
        return link

    yield start
    for link in started:
        link.close()
