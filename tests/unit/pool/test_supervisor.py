"""What the pool makes of Ray's words, and refuses before it starts a Ray."""

import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import pytest

from kfdist.config import load_config
from kfdist.control.validation import NAME
from kfdist.errors import EnvironmentFault
from kfdist.owner.owner import OwnerOptions
from kfdist.pool import command, supervisor
from kfdist.pool.command import run_pool
from kfdist.pool.ray_cluster import RayCluster
from kfdist.pool.supervisor import fault_of_start, owner_names

REPORT = """\
The actor died because of an error raised in its creation task, \x1b[36mray::owner-0:Owner.__init__()\x1b[39m (pid=7)
  File "kfdist/owner/owner.py", line 99, in __init__
    raise _unusable(path, f"can't be read ({error.strerror})") from None
kfdist.errors.EnvironmentFault: /x/owner.pem on node b can't be read (No such file or directory); `kfdist certs init`
"""


@pytest.mark.parametrize(
    ("report", "fault"),
    [
        (REPORT, "/x/owner.pem on node b can't be read (No such file or directory); `kfdist certs init`"),
        (REPORT.replace("creation task", "method"), ""),
        ("The actor died because its node has died.", ""),
        (REPORT.replace("kfdist.errors.EnvironmentFault", "MemoryError"), ""),
    ],
)
def test_what_an_owner_refuses_at_its_start_is_found_in_rays_report(report: str, fault: str):
    assert fault_of_start(report) == fault


def test_a_pool_whose_certificates_are_missing_starts_nothing(tmp_path: Path):
    config = load_config(None, overrides=[f"security.certificates={tmp_path}"], environment={})
    with pytest.raises(EnvironmentFault, match=rf"{tmp_path}/owner\.pem on node .* can't be read"):
        run_pool(config, directory=None, ready_file=None, parent_pid=None, on_ready=lambda owners: None)


@pytest.mark.parametrize(("gpus", "device", "share"), [(0, "cpu", 1.0), (0.25, "cuda", 0.25), (1, "cuda", 1.0)])
def test_a_bundle_with_a_gpu_makes_owners_invert_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: float, device: str, share: float
):
    given: list[OwnerOptions] = []

    class Actor:
        def options(self, **options: Any) -> "Actor":
            return self

        def remote(self, options: OwnerOptions) -> None:
            given.append(options)

    placement = SimpleNamespace(owner=None, remembers=False, host="", options=lambda index: {})
    monkeypatch.setattr(supervisor, "place", lambda ray, config: placement)
    config = load_config(None, overrides=[f"run.dir={tmp_path}", f"cluster.bundle.gpus={gpus}"], environment={})
    ray = SimpleNamespace(remote=lambda owner: Actor(), exceptions=SimpleNamespace(ActorAlreadyExistsError=KeyError))
    supervisor.Supervisor(SimpleNamespace(ray=ray, directory=tmp_path, own=True), config)  # pyright: ignore[reportArgumentType]
    assert [(each.device, each.gpu_share) for each in given] == [(device, share)] * config.cluster.owners


def test_an_owner_that_ray_refuses_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Taken(ValueError):
        pass

    refusals = [Taken("the name is taken"), ValueError("Use the 'memory' option")]

    class Actor:
        def options(self, **given: Any) -> "Actor":
            return self

        def remote(self, options: Any) -> None:
            raise refusals.pop(0)

    ray = SimpleNamespace(remote=lambda owner: Actor(), exceptions=SimpleNamespace(ActorAlreadyExistsError=Taken))
    placement = SimpleNamespace(owner=None, remembers=False, host="", options=lambda index: {})
    monkeypatch.setattr(supervisor, "place", lambda ray, config: placement)
    config = load_config(None, overrides=[f"run.dir={tmp_path}"], environment={})
    with pytest.raises(EnvironmentFault, match=r"Ray refuses owner-.*-0: Use the 'memory' option"):
        supervisor.Supervisor(SimpleNamespace(ray=ray, directory=tmp_path, own=True), config)  # pyright: ignore[reportArgumentType]
    assert refusals == []


@pytest.mark.parametrize(
    ("status", "usual", "words"),
    [
        ({"niceness": 0}, None, ""),
        ({}, None, ""),  # of an older kfdist
        ({"niceness": 15}, None, "at niceness 15, .*ray start"),
        ({"niceness": 0}, 0, ""),
        ({"niceness": 10}, 10, ""),  # the pool runs under `nice` itself
        ({"niceness": 12}, 10, "at niceness 12, .*without RAY_worker_niceness in the pool's environment .* 10"),
    ],
)
def test_an_owner_is_slowed_if_others_go_before_it_that_do_not_go_before_its_pool(
    status: dict[str, int], usual: int | None, words: str
):
    told = supervisor._slowed(status, usual)
    assert re.fullmatch(f".*{words}.*", told) if words else told == ""
    assert ("ray start" in told) == (usual is None and bool(words))


@pytest.mark.parametrize("asked_after", [None, 0, 3])
def test_a_raylet_that_ends_as_the_pool_is_stopped_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, asked_after: int | None
):
    looks = 0

    def ended() -> bool:
        nonlocal looks
        looks += 1
        return asked_after is not None and looks > asked_after

    def check() -> NoReturn:
        raise EnvironmentFault("Ray's raylet has ended")

    monkeypatch.setattr(command, "_STOP_SECONDS", 0.2)
    cluster = cast(RayCluster, SimpleNamespace(check=check))
    with pytest.raises(EnvironmentFault) if asked_after is None else nullcontext():
        command._check_ray(cluster, ended)


def test_a_raylet_that_ends_while_owners_start_is_told_of_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def check() -> NoReturn:
        raise EnvironmentFault("Ray's raylet has ended")

    placement = SimpleNamespace(owner=None, remembers=False, host="", options=lambda index: {})
    monkeypatch.setattr(supervisor, "place", lambda ray, config: placement)
    monkeypatch.setattr(supervisor.Supervisor, "_make_actor", lambda *_: None)
    monkeypatch.setattr(supervisor.Supervisor, "watch", lambda self: None)
    cluster = cast(RayCluster, SimpleNamespace(ray=None, directory=tmp_path, own=True))
    starting = supervisor.Supervisor(cluster, load_config(None, overrides=[f"run.dir={tmp_path}"], environment={}))
    with pytest.raises(EnvironmentFault, match="raylet has ended"):
        starting.wait_until_registered(lambda: False, check)


def test_no_two_pools_have_an_owner_of_the_same_name_and_a_controller_takes_every_name():
    pools = [owner_names(3) for _ in range(20)]
    names = [name for pool in pools for name in pool]
    assert len(set(names)) == 60
    assert all(NAME.fullmatch(name) for name in names)
    assert [name.rpartition("-")[2] for name in pools[0]] == ["0", "1", "2"]
    assert len({name.rpartition("-")[0] for name in pools[0]}) == 1
