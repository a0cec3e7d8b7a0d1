"""What holds for a run whose ranks, owners and controller are on hosts of their own while cables are cut and slow.

The short half, of one service and hardly more than one run; `test_several_machines.py` has the long one.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kfdist.owner.executor import CHILD_MODULE
from tests.support.commands import Process
from tests.support.far_service import Service, far_service, oldest, told
from tests.support.launches import summary_of
from tests.support.training import train
from tests.support.waits import eventually

# Two nodes of Ray and seven hosts. What is cut off here, test_owner_faults, test_controller_away and test_staleness in
# links/ stop and kill on one machine in every run.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NAME = "apart"
RUN = """
[run]
steps = 1000000
log_period = 2
[data]
name = "synthetic"
batch_size = 8
settings = { shape = [12], train_examples = 20000 }
[model]
name = "tests.support.small_models:unhurried_mlp"
[optimizer]
name = "sgd"
schedule = "constant"
[preconditioner]
settings = { rank = 6 }
[checkpoint]
period = 0
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[Service]:
    with far_service(tmp_path_factory.mktemp("borders"), certificates, RUN, spread=True) as started:
        yield started


@pytest.fixture(scope="module")
def directory(service: Service) -> Iterator[Path]:
    """Where host `a` has the files of an asap run under torchrun, which owners on both nodes have served."""
    directory = service.folder / "a" / NAME
    with service.torchrun(NAME) as (first, second):
        first.wait_until("a result of the owners for every block", lambda: oldest(directory) > 0)
        yield directory
        service.ask("stop", NAME)
        first.expect(0)  # with 75, torchrun would start the ranks again
        second.expect(0)


def inverting(service: Service, host: str) -> list[Process]:
    """Returns the processes that invert for the owner on a host."""
    return [process for process in service.hosts[host].processes() if CHILD_MODULE in process.title]


def stuck_at(directory: Path, *, seconds: float = 2.0) -> int:
    """Waits until a run has made no step for so long, and returns the step."""
    stands, since = told(directory)["step"], time.monotonic()
    ends = since + 90.0
    while time.monotonic() < since + seconds:
        assert time.monotonic() < ends, f"it still made steps, as far as {stands}"
        time.sleep(0.1)
        if (step := told(directory)["step"]) != stands:
            stands, since = step, time.monotonic()
    return stands


def test_fixed_lag_waits_for_owners_that_are_cut_off_obeys_and_changes_no_number(service: Service, tmp_path: Path):
    directory = service.folder / "a" / "lagged"
    fixed_lag = ("preconditioner.adoption=fixed-lag", "preconditioner.lag=5")
    command = service.worker("lagged", *fixed_lag)
    meeting = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": service.hosts["a"].address, "MASTER_PORT": "29502"}
    with (
        service.command("a", *command, environment={**meeting, "RANK": "0"}) as first,
        service.command("b", *command, environment={**meeting, "RANK": "1"}) as second,
    ):
        first.wait_until("steps with inverses", lambda: oldest(directory) > 0)
        with service.owners_apart():
            cut_at = told(directory)["step"]
            waited_at = stuck_at(directory)
            assert waited_at <= cut_at + 20  # two steps are untold; the next inversion is of ten on, and due five later
        first.wait_until("steps after the cut", lambda: told(directory)["step"] > waited_at + 20)
        with service.owners_apart():
            stuck_at(directory)
            service.ask("stop", "lagged")
            assert "the run was asked to stop while it waited" in first.expect(75)
            second.expect(75)
    stopped = summary_of(directory)
    assert stopped["status"] == "stopped"
    calm = train(
        *(tmp_path / "calm", *fixed_lag, "cluster.link=local", f"run.steps={stopped['steps']}"),
        ranks=2,
        recipe=str(service.config),
    )
    assert calm["parameter_sha256"] == stopped["parameter_sha256"]


def test_owners_on_both_nodes_invert_for_ranks_on_two_hosts(service: Service, directory: Path):
    hosts = service.hosts
    assert set(service.owners.values()) == {hosts["head"].address, hosts["node"].address}
    shown = service.ask("status", NAME)
    assert (shown["state"], shown["live_workers"], shown["live_owners"]) == ("running", 2, 2)
    for host in ("head", "node"):
        (child,) = inverting(service, host)
        before = child.cpu_seconds()
        eventually(child.cpu_seconds, lambda now, before=before: now > before, seconds=90)  # a pool at rest uses none
    assert told(directory)["step"] > 0


def test_asap_goes_on_with_rising_staleness_while_owners_are_cut_off(service: Service, directory: Path):
    with service.owners_apart():
        cut_at = told(directory)["step"]
        eventually(lambda: told(directory)["step"], lambda step: step > cut_at + 60, seconds=90)
        last = told(directory)
        # Whatever was made of later statistics than the cut's can't have come.
        assert last["staleness"]["max"] > 40 and oldest(directory) <= cut_at + 2
    eventually(lambda: oldest(directory), lambda step: step > last["step"], seconds=90)


def test_work_of_an_owner_that_only_ranks_cannot_reach_goes_to_the_other(service: Service, directory: Path):
    a, b, node = (service.hosts[name] for name in ("a", "b", "node"))
    with a.deaf_to(node), b.deaf_to(node):
        cut_at = told(directory)["step"]
        eventually(lambda: oldest(directory), lambda step: step > cut_at + 20, seconds=90)
        assert service.ask("status", NAME)["live_owners"] == 2  # it beats, and is in everybody's table


def test_a_run_goes_on_without_its_controller_and_obeys_once_that_is_back(service: Service, directory: Path):
    with service.hosts["control"].cut():
        cut_at = told(directory)["step"]
        eventually(lambda: oldest(directory), lambda step: step > cut_at, seconds=90)
    service.ask("checkpoint", NAME)

    def newest(host: str) -> int:
        return max(service.checkpoints(host, NAME), default=0)

    eventually(lambda: (newest("a"), newest("b")), lambda seen: min(seen) > cut_at, seconds=90)
    assert service.files("a", NAME) == service.files("b", NAME)  # each host has a whole copy


def test_delay_and_loss_delay_results_and_lose_none(service: Service, directory: Path):
    with (
        service.hosts["head"].slow(seconds=0.03, loss=0.05),
        service.hosts["node"].slow(seconds=0.03, loss=0.05),
    ):
        before = told(directory)["step"]
        eventually(lambda: oldest(directory), lambda step: step > before, seconds=90)
