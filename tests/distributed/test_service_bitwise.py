"""Three ranks, couriers, a controller and owners: bit for bit the ranks' own inversions, whatever fails on the way.

The owners are real processes without Ray around them; tests/end_to_end has them inside Ray.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import kfdist
from kfdist.comm.communicator import Communicator
from kfdist.comm.reduce import GradientReducer
from kfdist.links.rank.courier_process import COURIER_MODULE
from kfdist.system.processes import children_of, command_line
from tests.support.controller import ControllerThread
from tests.support.faults import EACH, Faults, reach
from tests.support.owners import OwnerProcess
from tests.support.ranks import run_ranks
from tests.support.small_models import images, small_cnn
from tests.support.waits import eventually

RANKS, STEPS = 3, 12


def train(communicator: Communicator, address: str | None, run: str, lag: int) -> tuple[str, dict]:
    """Trains and returns the parameters' bytes, and what the link had to repeat."""
    model = small_cnn(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    reducer = GradientReducer(list(model.parameters()), communicator, bucket_bytes=300)
    link = kfdist.connect(address, run=run, deadline_seconds=30) if address else None
    pre = kfdist.Preconditioner(
        model,
        {"0": "kfac", "*": "kfac-eigen"},
        damping=0.1,
        factor_period=1,
        inverse_period=3,
        kl_clip=1e-2,
        lr=0.05,
        adoption=kfdist.FixedLag(lag),
        link=link,
        digest_period=1,
    )
    for step in range(STEPS):
        if reach("kill_courier", step=step):
            os.kill(own_courier(), signal.SIGKILL)
        x, y = images(8, seed=100 * step + communicator.rank, dtype=torch.float32)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        reducer.reduce()
        pre.step()
        optimizer.step()
    counters = pre.counters()
    pre.close()
    reducer.close()
    digest = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters()).hex()
    return digest, {key: counters[key] for key in ("resubmissions", "courier_restarts")}


def own_courier() -> int:
    """Returns the process id of this rank's courier."""

    def couriers() -> list[int]:
        return [pid for pid in children_of(os.getpid()) if COURIER_MODULE.encode() in command_line(pid)]

    (pid,) = eventually(couriers, lambda found: len(found) == 1, seconds=10)
    return pid


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControllerThread]:
    with ControllerThread(tmp_path_factory.mktemp("control") / "state.sqlite") as running:
        yield running


@pytest.fixture(scope="module")
def owners(tmp_path_factory: pytest.TempPathFactory, controller: ControllerThread) -> Iterator[list[OwnerProcess]]:
    folder = tmp_path_factory.mktemp("owners")
    with (
        OwnerProcess("owner-0", folder=folder, controller=controller.address) as first,
        OwnerProcess("owner-1", folder=folder, controller=controller.address) as second,
    ):
        yield [first, second]


def parameters_of(results: list[tuple[str, dict]]) -> str:
    """Returns the parameters, the same on all ranks."""
    digests = {digest for digest, _ in results}
    assert len(digests) == 1
    return digests.pop()


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 5])
def test_owners_give_bitwise_what_the_ranks_themselves_compute(
    lag: int, controller: ControllerThread, owners: list[OwnerProcess]
) -> None:
    own = run_ranks(RANKS, train, None, "", lag)
    served = run_ranks(RANKS, train, controller.address, f"undisturbed-{lag}", lag)
    assert parameters_of(own) == parameters_of(served)


def in_background(act: Callable[[], None]) -> Callable[[], None]:
    """Runs `act` in a thread; the returned function waits for it and fails as it failed."""
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            act()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=guarded)
    thread.start()

    def join() -> None:
        thread.join(60)
        assert not thread.is_alive()
        if failures:
            raise failures[0]

    return join


def test_killed_owner_killed_couriers_and_delays_change_nothing(
    controller: ControllerThread, owners: list[OwnerProcess], faults: Faults
) -> None:
    own = run_ranks(RANKS, train, None, "", 5)
    victim, _ = owners
    slow = faults.at(owner="owner-0", inversion=EACH).delay(0.4)
    faults.at(owner="owner-1", inversion=EACH).delay(0.15)
    faults.at(rank=(0, 2), step=7).kill_courier()

    def kill_in_mid_inversion() -> None:
        eventually(lambda: slow.fired, bool, seconds=60)
        victim.kill()
        victim.start()

    join = in_background(kill_in_mid_inversion)
    disturbed = run_ranks(RANKS, train, controller.address, "disturbed", 5)
    join()
    assert parameters_of(own) == parameters_of(disturbed)
    # Two couriers were replaced, and jobs went out again after the owner's death.
    assert sum(counters["courier_restarts"] for _, counters in disturbed) == 2
    reasons = {reason for _, counters in disturbed for reason in counters["resubmissions"]}
    assert reasons - {"courier_lost"}, f"no job went out again because of its owner: {reasons}"
