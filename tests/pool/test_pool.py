"""`kfdist pool` with a real Ray: owners that serve, die, fall silent and come back, and nothing that outlives it."""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kfdist.links.rank.remote import RemoteLink
from kfdist.pool.ray_directory import ray_processes
from tests.support.commands import Command
from tests.support.controller import ControllerThread
from tests.support.jobs import RUN, collect, context, job, payload, result_of
from tests.support.waits import eventually

START_SECONDS = 90.0


@dataclass
class Pool:
    """A running pool: the command, its controller, and what its ready file said."""

    command: Command
    controller: ControllerThread
    directory: Path
    logs: Path
    owners: int

    def titled(self, title: str) -> dict[int, int]:
        """Returns the pool's processes of a title, each with its parent."""
        return {process.pid: process.parent for process in self.command.members(title)}

    def names(self) -> list[str]:
        """Returns the owners' names, by number."""
        return sorted(self.owner_processes())

    def owner_processes(self) -> dict[str, int]:
        """Returns the process id of each owner, by name, as of its newest start."""
        files = (self.directory / "owners").glob("*.json")
        return {file.stem: json.loads(file.read_text())["pid"] for file in files}

    def registered(self) -> dict[str, tuple[str, int]]:
        """Returns each live owner's address and number of restarts, as the controller has them."""
        return {owner.owner_id: (owner.address, owner.restarts) for owner in self.controller.live_owners()}


def start_pool(folder: Path, controller: ControllerThread, *arguments: str, **environment: str) -> Pool:
    ready = folder / "ready.json"
    command = Command(
        *("pool", "--set", f"run.name={RUN}", "--set", f"run.dir={folder / 'run'}"),
        *("--controller", controller.address),
        *("--ready-file", str(ready), "--json", *arguments),
        environment=environment,
    )
    try:
        said = command.wait_for_file(ready, START_SECONDS)
    except BaseException:
        command.close()
        raise
    command.family()  # remembers its processes
    return Pool(
        command=command,
        controller=controller,
        directory=Path(said["directory"]),
        logs=folder / "run" / "logs",
        owners=said["owners"],
    )


@pytest.fixture(scope="module")
def controller(tmp_path_factory) -> Iterator[ControllerThread]:
    with ControllerThread(tmp_path_factory.mktemp("controller") / "control.sqlite", lease_seconds=4.0) as running:
        yield running


@pytest.fixture(scope="module")
def pool(controller, tmp_path_factory) -> Iterator[Pool]:
    started = start_pool(tmp_path_factory.mktemp("pool"), controller)
    yield started
    started.command.close()


@pytest.fixture
def link(controller) -> Iterator[RemoteLink]:
    link = RemoteLink(controller.address)
    link.start(context())
    yield link
    link.close()


def submit(link: RemoteLink, name: str, count: int) -> dict[str, bytes]:
    """Submits jobs and returns what must come back for each group."""
    jobs = [job(f"{name}{i}", data=payload(96, seed=i, method="kfac-eigen"), deadline_seconds=30) for i in range(count)]
    for each in jobs:
        link.submit(each)
    return {each.group: result_of(each.payload) for each in jobs}


def check(results: dict[tuple[str, int], Any], wanted: dict[str, bytes]) -> None:
    assert {group: result.payload for (group, _), result in results.items()} == wanted


def all_of_them_serve(link: RemoteLink, owners: Collection[str]) -> None:
    served: set[str] = set()
    for turn in range(20):  # the link may hear of one later than of another
        wanted = submit(link, f"shared-{turn}-", 12)
        results = collect(link, 12, seconds=60)
        check(results, wanted)
        served |= {result.owner for result in results.values()}
        if served == set(owners):
            return
    pytest.fail(f"of {owners} only {served} served")


def test_owners_serve_and_look_as_they_should(pool, link):
    assert pool.owners == 2
    all_of_them_serve(link, pool.names())
    owners = pool.titled("ray::Owner")
    assert set(pool.owner_processes().values()) == set(owners)
    children = pool.titled("kfdist.owner.child")
    assert set(children.values()) == set(owners)  # each owner has one process that inverts
    priorities = {os.getpriority(os.PRIO_PROCESS, process) for process in [*owners, *children]}
    assert priorities == {os.getpriority(os.PRIO_PROCESS, 0)}  # nobody goes before them
    shown = json.loads(pool.command.wait_for_line("owners"))["owners"]
    assert [(owner["owner_id"], owner["address"]) for owner in shown] == [
        (name, pool.registered()[name][0]) for name in pool.names()
    ]


def test_what_owners_log_outlives_the_pool_s_directory(pool):
    for name, (address, _) in pool.registered().items():
        log = (pool.logs / f"{name}.log").read_text()
        assert f"INFO kfdist.owner.owner: {name}, start 1, serves at {address}" in log


def test_torch_is_in_the_inversion_process_only(pool):
    for owner in pool.titled("ray::Owner"):
        assert "libtorch" not in Path(f"/proc/{owner}/maps").read_text()
    for child in pool.titled("kfdist.owner.child"):
        assert "libtorch" in Path(f"/proc/{child}/maps").read_text()


def test_the_token_is_for_this_user_alone_and_ray_takes_no_caller_without_it(pool):
    token = pool.directory / "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(pool.directory.stat().st_mode) == 0o700
    (raylet,) = pool.command.members("raylet --")
    environment = Path(f"/proc/{raylet.pid}/environ").read_bytes().split(b"\0")
    assert b"RAY_AUTH_MODE=token" in environment
    assert f"RAY_AUTH_TOKEN_PATH={token}".encode() in environment
    assert token.read_bytes() not in b"".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pool.titled(""))
    address = ray_address(pool)
    script = f"import ray; ray.init({address!r}, log_to_driver=False)"
    stranger = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_NUM_REDIS_GET_RETRIES": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=stranger, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "InvalidAuthToken" in done.stderr


def ray_address(pool: Pool) -> str:
    (raylet,) = pool.command.members("raylet --")
    (address,) = set(re.findall(r"--gcs-address=([\d.:]+)", raylet.title))
    return address


def test_a_ray_with_other_authentication_is_told_from_one_that_is_not_there(pool, tmp_path):
    # A HOME without a token: kfdist takes it that this Ray needs none.
    environment = {"HOME": str(tmp_path), "RAY_NUM_REDIS_GET_RETRIES": "2"}
    text = refused("--set", f"cluster.ray={ray_address(pool)}", code=1, environment=environment)
    assert f'Ray at cluster.ray = "{ray_address(pool)}" refuses this pool' in text
    assert "RAY_AUTH_MODE is 'disabled' here: a cluster with a token needs RAY_AUTH_MODE=token" in text


@pytest.mark.slow  # unit/pool/test_supervisor.py has what the pool does then, without a Ray
def test_a_pool_whose_raylet_has_ended_ends_and_says_so(controller, tmp_path):
    """Whoever started the pool starts it again; Ray wouldn't start the owners, and the pool had waited for ever."""
    lost = start_pool(tmp_path, controller, "--set", "cluster.owners=1")
    try:
        (raylet,) = lost.command.members("raylet --")
        os.kill(raylet.pid, signal.SIGKILL)
        said = lost.command.expect(1, 60)
        assert f"Ray's raylet (process {raylet.pid}) has ended, and all owners with it; start the pool again" in said
        assert lost.command.left_behind(10) == []
        assert not lost.directory.exists()
    finally:
        lost.command.close()


def test_an_owner_that_is_killed_comes_back_where_it_was(pool, link):
    name, other = pool.names()
    before, killed = pool.registered(), pool.owner_processes()[name]
    wanted = submit(link, "killed", 16)
    link.wait(10)
    os.kill(killed, signal.SIGKILL)
    check(collect(link, 16, seconds=60), wanted)
    after = eventually(pool.registered, lambda seen: seen.get(name, ("", 0))[1] == 1, seconds=60)
    assert after[name][0] == before[name][0]
    assert after[other] == before[other]
    assert pool.owner_processes()[name] != killed
    eventually(lambda: len(pool.titled("kfdist.owner.child")), lambda count: count == 2)


def test_an_owner_that_is_stopped_is_killed_and_comes_back(pool, link):
    name = pool.names()[1]
    stopped = pool.owner_processes()[name]
    os.kill(stopped, signal.SIGSTOP)
    wanted = submit(link, "stopped", 16)
    check(collect(link, 16, seconds=60), wanted)
    eventually(pool.registered, lambda seen: seen.get(name, ("", 0))[1] == 1, seconds=60)
    assert not Path(f"/proc/{stopped}").exists()
    assert name in pool.command.wait_for_line("hasn't answered for")


def test_an_inversion_process_that_is_killed(pool, link):
    wanted = submit(link, "child", 16)
    for child in pool.titled("kfdist.owner.child"):
        os.kill(child, signal.SIGKILL)
    check(collect(link, 16, seconds=60), wanted)
    assert set(link.counters().resubmissions) <= {"crash"}


def test_an_owner_that_fails_to_start_again_is_made_anew_once_it_can_be(pool, link):
    name, other = pool.names()
    before = pool.owner_processes()
    memory = pool.directory / "owners" / f"{name}.json"
    memory.unlink()
    memory.mkdir()  # where the owner can't write, then
    os.kill(before[name], signal.SIGKILL)
    assert "Is a directory" in pool.command.wait_for_line(f"{name} can't be started again by Ray")
    pool.command.wait_for_line(f"{name} can't be started again by Ray")
    memory.rmdir()
    eventually(pool.owner_processes, lambda seen: seen.get(name, before[name]) != before[name], seconds=60)
    all_of_them_serve(link, [name, other])


def test_nothing_of_ray_is_left_when_the_pool_is_killed(pool):
    assert len(ray_processes(pool.directory)) >= 8
    pool.command.signal(signal.SIGKILL)
    pool.command.wait(5)
    # Ray's own agents would live for half a minute more.
    assert pool.command.left_behind(5.0) == []
    eventually(pool.directory.exists, lambda there: not there)


@pytest.mark.slow
def test_two_pools_serve_one_controller(tmp_path):
    """And SIGTERM, by which every launch ends its pool, leaves nothing of one."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with (
        ControllerThread(tmp_path / "control.sqlite") as controller,
        start_pool(folders[0], controller, "--set", "cluster.owners=1").command as first,
        start_pool(folders[1], controller, "--set", "cluster.owners=1").command as second,
    ):
        owners = [json.loads(pool.wait_for_line("owners"))["owners"][0]["owner_id"] for pool in (first, second)]
        eventually(lambda: {owner.owner_id for owner in controller.live_owners()}, lambda seen: seen == set(owners))
        link = RemoteLink(controller.address)
        link.start(context())
        try:
            all_of_them_serve(link, owners)
            directory = Path(json.loads((folders[0] / "ready.json").read_text())["directory"])
            first.signal(signal.SIGTERM)
            first.expect(0, seconds=10)
            assert first.left_behind(1.0) == []
            assert not directory.exists()
            wanted = submit(link, "left", 4)
            results = collect(link, 4, seconds=60)
            check(results, wanted)
            assert {result.owner for result in results.values()} == {owners[1]}
        finally:
            link.close()


@pytest.mark.slow
def test_an_owner_that_others_go_before_is_told_of(controller, tmp_path):
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    # Ray adds it to its own.
    pool = start_pool(tmp_path, controller, "--set", "cluster.owners=1", RAY_worker_niceness="1")
    with pool.command:
        said = pool.command.wait_for_line("without RAY_worker_niceness in the pool's environment")
    assert f"at niceness {usual + 1}, " in said
    assert f"keeps the pool's {usual}\"" in said


@pytest.mark.slow
def test_nothing_of_ray_is_left_when_the_parent_of_a_pool_ends(controller, tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as parent:
        pool = start_pool(tmp_path, controller, "--set", "cluster.owners=1", "--parent-pid", str(parent.pid))
        with pool.command:
            assert pool.titled("ray::Owner")
            parent.kill()
            pool.command.wait(10)
            assert pool.command.left_behind(5.0) == []
            eventually(pool.directory.exists, lambda there: not there)


def refused(*arguments: str, code: int, environment: dict[str, str] | None = None) -> str:
    with Command("pool", *arguments, environment=environment) as command:
        text = command.expect(code, seconds=60)
        assert command.left_behind(1.0) == []
        return text


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (2, "cluster.owners: is 0", ["--set", "cluster.owners=0"]),
        (2, "has port 0", ["--controller", "127.0.0.1:0"]),
        (1, "nobody listens at cluster.ray", ["--set", f"cluster.ray=127.0.0.1:{free_port()}"]),
        (2, "exists; choose a new one", ["--directory", "/tmp"]),
        (2, "too long for the sockets", ["--directory", f"/tmp/{'long' * 10}"]),
    ],
)
def test_what_cannot_be_is_told(code, message, arguments):
    text = refused(*arguments, code=code)
    assert message in text
    assert "Traceback" not in text
