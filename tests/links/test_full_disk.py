"""What ranks and owners say where a controller is there and can't take them, as its disk is full."""

import asyncio
from pathlib import Path

import pytest

from kfdist.errors import EnvironmentFault
from kfdist.owner.membership import Membership
from kfdist.rpc._generated.kfdist.v1 import inversion_pb2, membership_pb2
from tests.support.controller import ControllerThread
from tests.support.waits import eventually

FAULT = "the controller's file can't be written: the disk is full"


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(batch: object) -> None:
        raise EnvironmentFault(FAULT)

    with ControllerThread(tmp_path / "control.sqlite") as controller, monkeypatch.context() as patched:
        patched.setattr(controller.controller.ledger._store, "commit", refuse)
        yield controller


def test_a_rank_says_why_it_is_not_taken(full: ControllerThread, start_link, capfd: pytest.CaptureFixture[str]):
    start_link(full.address)
    said: list[str] = []

    def read() -> str:
        said.append(capfd.readouterr().err)
        return "".join(said)

    told = f"the controller at {full.address} refuses this rank: {FAULT}"
    assert eventually(read, lambda text: told in text, seconds=30).count(told) == 1


def test_an_owner_says_why_it_is_not_taken(full: ControllerThread):
    async def refusal() -> str:
        owner = inversion_pb2.Owner(owner_id="owner-0", address="127.0.0.1:1", fingerprint="cpu")
        membership = Membership(
            full.address,
            None,
            membership_pb2.RegisterOwnerRequest(owner=owner),
            measure=lambda: [],
            learn_peers=lambda owners: None,
        )
        task = asyncio.create_task(membership.run())
        async with asyncio.timeout(20):
            while not membership.refusal:
                await asyncio.sleep(0.05)
        task.cancel()
        assert not membership.registered
        return membership.refusal

    assert asyncio.run(refusal()) == FAULT
