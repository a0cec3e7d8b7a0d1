"""A courier's parts against owners and controllers with TLS and a token, in the event loop of the test."""

import asyncio
import hashlib
import os
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from kfdist.links.courier.dispatch import Dispatcher
from kfdist.links.courier.known_owners import KnownOwner, OwnerDirectory
from kfdist.links.courier.session import ControllerSession
from kfdist.links.link import LinkCounters
from kfdist.links.shared_memory import create_input, create_output
from kfdist.links.socket_messages import CourierSetup, Done, Submit
from kfdist.owner.inversion_service import InversionServicer
from kfdist.owner.owner import Owner as Real
from kfdist.owner.owner import OwnerOptions
from kfdist.rpc._generated.kfdist.v1.inversion_pb2 import Owner
from kfdist.rpc.certificates import make_certificates, renew_certificates
from kfdist.system.credentials import Credentials, Role
from kfdist.telemetry.tracing import Tracing
from tests.support.controller import ControllerThread, values
from tests.support.jobs import context
from tests.support.owners import start_echo
from tests.support.waits import eventually

TICKETS = iter(range(1_000_000))


@dataclass
class Scene:
    """An owner, a courier's dispatcher that knows it, and what became of jobs."""

    servicer: InversionServicer
    address: str
    directory: OwnerDirectory
    dispatcher: Dispatcher
    done: asyncio.Queue[Done]
    tasks: asyncio.TaskGroup
    count: list[LinkCounters]

    def submit(self, payload: bytes = bytes(8) + b"payload") -> int:
        """Hands over a job and returns its ticket."""
        submit = Submit(
            ticket=next(TICKETS),
            group="group",
            version=0,
            digest=hashlib.sha256(payload).hexdigest(),
            deadline_seconds=5.0,
            fingerprint="",
            payload_bytes=len(payload),
            submitted_ns=0,
        )
        self.dispatcher.submit(self.tasks, submit, create_input(payload), create_output())
        return submit.ticket

    async def finish(self) -> int:
        """Waits for the next result and returns its ticket."""
        async with asyncio.timeout(10):
            return (await self.done.get()).ticket


@asynccontextmanager
async def scene(owners: Path, ours: Credentials | None) -> AsyncIterator[Scene]:
    owner = Credentials.at(Role.OWNER, str(owners), None)
    server, servicer, address = await start_echo(owner)
    directory, done, count = OwnerDirectory(), asyncio.Queue[Done](), []
    directory.update([KnownOwner(owner_id="owner-0", address=address)])
    setup = CourierSetup(address="127.0.0.1:1", rank_pid=os.getpid(), context=context(), credentials=ours)
    dispatcher = Dispatcher(
        setup,
        directory,
        done=done.put_nowait,
        count=count.append,
        fenced=pytest.fail,
        tracing=Tracing("test"),
    )
    try:
        async with asyncio.TaskGroup() as tasks:
            yield Scene(servicer, address, directory, dispatcher, done, tasks, count)
            dispatcher.cancel_all()
    finally:
        await server.stop(None)


@pytest.fixture
def ours(certificates: Path) -> Credentials:
    return Credentials(role=Role.CLIENT, certificates=str(certificates), token_file=str(certificates / "token"))


def copied(ours: Credentials, folder: Path) -> Credentials:
    """Returns credentials of files that a test may change."""
    directory = shutil.copytree(ours.certificates, folder / "copy")
    return replace(ours, certificates=str(directory), token_file=str(directory / "token"))


def test_jobs_travel_and_new_certificates_are_taken_up_on_both_sides(ours: Credentials, tmp_path: Path):
    courier = copied(ours, tmp_path)
    owner = shutil.copytree(ours.certificates, tmp_path / "owner")
    make_certificates(tmp_path / "new")

    async def both() -> None:
        async with scene(owner, courier) as here:
            assert here.submit() == await here.finish()
            for directory in (owner, Path(courier.certificates)):
                for file in (tmp_path / "new").iterdir():
                    (directory / file.name).write_bytes(file.read_bytes())
            assert here.submit(bytes(8) + b"another") == await here.finish()
            assert here.servicer.completed == 2 and sum(each.resubmissions != {} for each in here.count) == 0

    asyncio.run(both())


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("token", "refuses the token: give both sides the same one"),
        ("client.pem", "client.pem isn't signed by"),
        ("ca.pem", "is of another authority"),
    ],
)
def test_a_job_that_an_owner_does_not_trust_waits_says_why_and_is_done_once_it_does(
    ours: Credentials, tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, words: str
):
    courier = copied(ours, tmp_path)
    make_certificates(tmp_path / "others")
    shutil.copy(tmp_path / "others" / file, courier.certificates)

    async def told() -> None:
        async with scene(Path(ours.certificates), courier) as here:
            ticket = here.submit()
            async with asyncio.timeout(10):
                while words not in caplog.text:
                    await asyncio.sleep(0.02)
            assert here.servicer.completed == 0 and here.done.empty()
            shutil.copy(Path(ours.certificates, file), courier.certificates)
            assert await here.finish() == ticket

    asyncio.run(told())


def test_a_job_without_a_certificate_file_waits_for_it(ours: Credentials, tmp_path: Path, caplog):
    courier = copied(ours, tmp_path)
    Path(courier.certificates, "client.pem").unlink()

    async def told() -> None:
        async with scene(Path(ours.certificates), courier) as here:
            ticket = here.submit()
            async with asyncio.timeout(10):
                while "client.pem on node" not in caplog.text:
                    await asyncio.sleep(0.02)
            shutil.copy(Path(ours.certificates, "client.pem"), courier.certificates)
            assert await here.finish() == ticket

    asyncio.run(told())


def session(address: str, directory: OwnerDirectory, credentials: Credentials | None) -> ControllerSession:
    setup = CourierSetup(address=address, rank_pid=os.getpid(), context=context(), credentials=credentials)
    return ControllerSession(
        setup,
        directory,
        owners_changed=lambda: None,
        settings_changed=lambda settings: None,
        count=lambda more: None,
        fenced=pytest.fail,
    )


def test_owners_tell_their_peers_over_tls_while_no_controller_is_there(
    ours: Credentials, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("kfdist.links.courier.session._PEERS_SECONDS", 0.1)

    async def told() -> None:
        async with scene(Path(ours.certificates), ours) as here:
            here.servicer.set_peers([Owner(owner_id=f"owner-{i}", address="127.0.0.1:9") for i in range(3)])
            task = asyncio.create_task(session("127.0.0.1:1", here.directory, ours).keep_finding_owners())
            async with asyncio.timeout(10):
                while len(here.directory.owners) < 3:
                    await asyncio.sleep(0.02)
            task.cancel()

    asyncio.run(told())


def test_a_controller_that_does_not_trust_a_courier_is_named_once_with_the_reason(
    ours: Credentials, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    courier = copied(ours, tmp_path)
    Path(courier.token_file).write_text("w" * 20)
    controllers = Credentials.at(Role.CONTROLLER, ours.certificates, None)

    async def told(address: str) -> None:
        talking = [session(address, OwnerDirectory(), each) for each in (courier, None)]
        tasks = [asyncio.create_task(each.run()) for each in talking]
        async with asyncio.timeout(10):
            while not ("refuses the token" in caplog.text and "takes nothing without TLS" in caplog.text):
                await asyncio.sleep(0.02)
            shutil.copy(Path(ours.certificates, "token"), courier.token_file)
            while not talking[0]._connected:
                await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()

    with ControllerThread(tmp_path / "c.sqlite", credentials=controllers) as controller:
        asyncio.run(told(controller.address))
    assert caplog.text.count("refuses the token") == 1


def test_owners_and_ranks_tell_when_their_certificates_expire_and_that_they_were_renewed(
    ours: Credentials, tmp_path: Path
):
    ranks = copied(ours, tmp_path)
    controllers, owners = (Credentials.at(role, ours.certificates, None) for role in (Role.CONTROLLER, Role.OWNER))

    def told(process: str, file: str) -> int | None:
        found = values(controller.scrape())
        expiry = found.get(f'kfdist_certificate_expiry_timestamp_seconds{{file="{file}",process="{process}"}}')
        return None if expiry is None else round((expiry - time.time()) / 86400)

    async def rank_tells() -> None:
        task = asyncio.create_task(session(controller.address, OwnerDirectory(), ranks).run())
        await asyncio.to_thread(eventually, lambda: told("rank", "client.pem"), lambda days: days == 365)
        renew_certificates(Path(ranks.certificates), days=20)
        await asyncio.to_thread(eventually, lambda: told("rank", "client.pem"), lambda days: days == 20)
        task.cancel()

    with ControllerThread(tmp_path / "c.sqlite", credentials=controllers, lease_seconds=2.0) as controller:
        owner = Real(OwnerOptions(owner_id="owner-0", controller=controller.address, credentials=owners))
        try:
            eventually(lambda: told("owner", "owner.pem"), lambda days: days == 365, seconds=60)
            assert told("owner", "ca.pem") == 3650
            asyncio.run(rank_tells())
        finally:
            owner.close()
        for process, file in (("owner", "owner.pem"), ("rank", "client.pem")):
            eventually(lambda: told(process, file), lambda days: days is None)  # noqa: B023 - called at once
