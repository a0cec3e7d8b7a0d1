"""What the controller knows of a library user's run whose loop has ended."""

import os

import grpc
import pytest

import kfdist
from kfdist.control.control_records import RunState
from kfdist.errors import Interrupted
from tests.support.controller import ControllerThread, Member
from tests.support.preconditioning import preconditioner, two_layers
from tests.support.waits import eventually


def made(controller: ControllerThread, run: str) -> kfdist.Preconditioner:
    return preconditioner(two_layers(), link=kfdist.connect(controller.address, run=run, epoch=1))


def test_a_loop_that_closes_leaves_a_finished_run_whose_number_is_free_at_once(controller: ControllerThread) -> None:
    with controller.client() as client, Member(controller.address) as another:
        made(controller, "closed").close()
        run = client.get("closed")
        assert (run.state, run.live_workers) == (RunState.FINISHED, 0)
        another.register_worker("closed", pid=os.getpid() + 1)  # was refused for a lease
        assert client.get("closed").state is RunState.CREATED


def test_a_loop_that_is_interrupted_leaves_a_stopped_run(controller: ControllerThread) -> None:
    with controller.client() as client:
        with pytest.raises(Interrupted), made(controller, "interrupted") as pre:
            pre.pipeline.agreement.stop = True  # as all ranks have agreed
            raise Interrupted("the run was asked to stop while it waited", reason="stop")
        assert client.get("interrupted").state is RunState.STOPPED


def test_a_loop_that_raises_leaves_a_failed_run(controller: ControllerThread) -> None:
    with controller.client() as client:
        with pytest.raises(ValueError), made(controller, "raised"):
            raise ValueError
        assert client.get("raised").state is RunState.FAILED


def test_a_rank_that_says_nothing_of_its_end_keeps_its_number_for_a_lease(controller: ControllerThread) -> None:
    with Member(controller.address) as silent, Member(controller.address) as another:
        silent.register_worker("silent", pid=1)
        silent.beat_worker("silent", step=1)
        with pytest.raises(grpc.RpcError, match="another run has this name"):
            another.register_worker("silent", pid=2)


def test_a_process_with_the_same_id_in_another_container_is_another_run(controller: ControllerThread) -> None:
    with controller.client() as client, made(controller, "twice"), Member(controller.address) as another:
        states = eventually(lambda: {run.name: run.state for run in client.runs()}, lambda found: "twice" in found)
        assert states["twice"] in (RunState.CREATED, RunState.RUNNING)
        with pytest.raises(grpc.RpcError, match=f"is process {os.getpid()} already: another run has this name"):
            another.register_worker("twice", pid=os.getpid(), process="a word of its own")
