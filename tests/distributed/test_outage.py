"""A controller that dies while a run trains: steps and inversions go on, and couriers come back by themselves."""

import statistics
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kfdist
from kfdist.comm.communicator import Communicator
from kfdist.comm.reduce import GradientReducer
from kfdist.control.client import ControlClient
from kfdist.control.control_records import RunState
from kfdist.rpc.channels import CALL_SECONDS
from tests.support.controller import address_of_its_own
from tests.support.killed_controllers import KilledController
from tests.support.owners import OwnerProcess
from tests.support.ranks import run_ranks
from tests.support.small_models import images, small_cnn
from tests.support.waits import eventually

RANKS, STEPS = 2, 150
"""Steps before, during and after the outage, each."""

LAG = 4


class Turn:
    """Where ranks and the test's own process wait for each other, by files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def say(self, word: str) -> None:
        (self._folder / word).touch()

    def wait_for(self, word: str) -> None:
        eventually((self._folder / word).exists, bool, seconds=90)


def train(communicator: Communicator, folder: Path | None, address: str | None) -> tuple[str, list[list[float]], int]:
    """Trains through an outage; returns the parameters, the seconds of the steps by phase, and what damping came to."""
    model = small_cnn(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    reducer = GradientReducer(list(model.parameters()), communicator, bucket_bytes=300)
    pre = kfdist.Preconditioner(
        model,
        "kfac-eigen",
        damping=0.1,
        factor_period=1,
        inverse_period=3,
        lr=0.02,
        adoption=kfdist.FixedLag(LAG),
        link=kfdist.connect(address, run="outage") if address else None,
    )
    turn, phases = Turn(folder) if folder else None, []

    def step(number: int) -> float:
        begun = time.perf_counter()
        x, y = images(8, seed=100 * number + communicator.rank, dtype=torch.float32)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        reducer.reduce()
        pre.step()
        optimizer.step()
        if number % 10 == 0:
            pre.beat("running")
        return time.perf_counter() - begun

    for phase, (said, awaited) in enumerate((("", ""), ("trained", "killed"), ("trained-alone", "started"))):
        if turn is not None and said:
            turn.say(said)
            turn.wait_for(awaited)
        phases.append([step(number) for number in range(phase * STEPS, (phase + 1) * STEPS)])
    digest = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters()).hex()
    if turn is not None:
        turn.say("trained-again")
        number, ended = 3 * STEPS, False
        while not ended:  # until all ranks know at the same step that a user has asked for another damping
            step(number)
            number, ended = number + 1, pre.pipeline.in_force.changes == {"damping": 0.5}
    pre.close()
    reducer.close()
    return digest, phases, pre.counters()["courier_restarts"]


@pytest.mark.slow
def test_training_does_not_notice_that_the_controller_is_gone(tmp_path: Path, record_property: Any) -> None:
    controller, turn = KilledController(tmp_path, address_of_its_own()), Turn(tmp_path)
    controller.start()
    seen: list[RunState] = []

    def kill_and_start() -> None:
        turn.wait_for("trained")
        controller.kill()
        turn.say("killed")
        turn.wait_for("trained-alone")
        controller.start()
        turn.say("started")
        turn.wait_for("trained-again")
        with ControlClient(controller.address) as client:
            run = eventually(lambda: client.get("outage"), lambda run: run.live_workers == RANKS, seconds=60)
            seen.append(run.state)
            client.update_settings("outage", damping=0.5)

    with (
        OwnerProcess("owner-0", folder=tmp_path, controller=controller.address),
        OwnerProcess("owner-1", folder=tmp_path, controller=controller.address),
    ):
        acting = threading.Thread(target=kill_and_start, daemon=True)
        acting.start()
        through = run_ranks(RANKS, train, tmp_path, controller.address)
        acting.join(60)
        alone = run_ranks(RANKS, train, None, None)
    assert seen == [RunState.RUNNING]
    assert {digest for digest, _, _ in through} == {digest for digest, _, _ in alone}, "no number has moved"
    assert [restarts for _, _, restarts in through] == [0] * RANKS, "the couriers stayed"
    for name, phase in zip(("before", "during", "after"), through[0][1], strict=True):
        middle, late = statistics.median(phase) * 1e3, statistics.quantiles(phase, n=100)[-1] * 1e3
        record_property(name, f"median {middle:.2f} ms, p99 {late:.2f} ms")
        print(f"{name} the outage: median {middle:.2f} ms, p99 {late:.2f} ms, longest {max(phase) * 1e3:.0f} ms")
        assert max(phase) < CALL_SECONDS, "some step waited for the controller"
    with ControlClient(controller.address) as client:
        assert [event.kind for event in client.events("outage")].count("settings_obeyed") <= 1
        assert client.get("outage").settings_revision == 1
    controller.kill()
