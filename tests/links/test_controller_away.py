"""Jobs go on while the controller is away, and the courier comes back to it by itself."""

import threading
import time

import pytest

from kfdist.control.control_records import RunState
from kfdist.types import Desired, MetricSample
from tests.support.controller import ControllerThread
from tests.support.jobs import RUN, collect, context, job, payload, result_of
from tests.support.owners import OwnerProcess
from tests.support.waits import eventually


@pytest.fixture
def state(tmp_path):
    return tmp_path / "control.sqlite"


def start_controller(state, address: str = "127.0.0.1:0") -> ControllerThread:
    return ControllerThread(state, address=address, lease_seconds=3.0)


def test_a_controller_that_is_never_there(start_link):
    # Samples find no place where the courier keeps them: it is up, which a busy machine takes seconds for.
    link = start_link("127.0.0.1:9", queued_samples=1_000_000)
    link.beat(0, "running", [MetricSample(name="kfdist_steps_total", value=float(i)) for i in range(21_000)])
    eventually(lambda: link.counters().samples_dropped, bool, seconds=60)
    link.submit(job())
    for step in range(3):
        link.beat(step, "running", [])
        link.wait(0.3)
        assert link.poll() == []
    assert link.settings().desired is Desired.RUNNING
    begun = time.monotonic()
    link.close()
    assert time.monotonic() - begun < 7, "a controller that is known to be away is waited for"


def test_a_slow_controller_still_hears_that_a_short_run_has_ended(state, start_link):
    async def stall() -> None:
        time.sleep(4)  # the whole server

    with start_controller(state) as controller:
        stalling = threading.Thread(target=controller.call, args=(stall(),))
        stalling.start()
        link = start_link(controller.address)
        link.beat(20, "finished", [])
        link.close()
        stalling.join()
        with controller.client() as client:
            seen = client.get(RUN)
    assert (seen.state, seen.step) == (RunState.FINISHED, 20)


def test_a_controller_that_goes_and_comes_back(state, tmp_path, start_link):
    controller = start_controller(state)
    with (
        OwnerProcess("owner-0", folder=tmp_path, controller=controller.address) as first,
        OwnerProcess("owner-1", folder=tmp_path, controller=controller.address) as second,
    ):
        link = start_link(controller.address)
        jobs = [job("group", version=version, data=payload(16, seed=version)) for version in range(40)]
        eventually(lambda: [owner.status()["registered"] for owner in (first, second)], all, seconds=60)
        for each in jobs[:10]:
            link.submit(each)
        results = collect(link, 10)
        controller.close()

        for each in jobs[10:20]:
            link.submit(each)
        results |= collect(link, 10)

        # An owner that is killed and started again is found where it was, as nobody could say where else it is.
        second.kill()
        first.kill()
        first.start()
        for each in jobs[20:30]:
            link.submit(each)
        results |= collect(link, 10)
        assert {results["group", version].owner for version in range(20, 30)} == {"owner-0"}

        samples = [MetricSample(name="kfdist_steps_total", value=float(i)) for i in range(8000)]
        for step in range(3):
            link.beat(step, "running", samples)
            time.sleep(0.5)
        eventually(lambda: link.counters().samples_dropped, lambda dropped: dropped == 3 * 8000 - 20_000)

        link.beat(77, "running", [])
        controller = start_controller(state, controller.address)
        try:
            with controller.client() as client:
                eventually(lambda: client.get(RUN), lambda run: (run.step, run.live_workers) == (77, 1))
                eventually(lambda: [owner.name for owner in client.owners(RUN)], lambda names: names == ["owner-0"])
                client.stop(RUN)
                eventually(link.settings, lambda settings: settings.desired is Desired.STOPPED)
            for each in jobs[30:]:
                link.submit(each)
            results |= collect(link, 10)
        finally:
            link.close()
            controller.close()
        assert all(results["group", each.version].payload == result_of(each.payload) for each in jobs)


def test_a_newer_start_of_the_run_has_the_older_one_stopped(state, tmp_path, start_link, capfd):
    controller = start_controller(state)
    with OwnerProcess("owner-0", folder=tmp_path, controller=controller.address) as owner:
        eventually(lambda: owner.status()["registered"], bool, seconds=60)
        old = start_link(controller.address, as_told=context(epoch=1))
        old.submit(job("group", version=0, epoch=1))
        collect(old, 1)
        revision = old.settings().revision
        new = start_link(controller.address, as_told=context(epoch=2))
        new.submit(job("group", version=0, epoch=2))
        collect(new, 1)
        settings = eventually(old.settings, lambda settings: settings.desired is Desired.STOPPED)
        assert settings.revision > revision
        old.submit(job("group", version=1, epoch=1))
        eventually(lambda: old.counters().resubmissions.get("stale_epoch", 0), bool)
        assert old.poll() == []
        assert new.settings().desired is Desired.RUNNING
        new.close()
        old.close()
    controller.close()
    assert "superseded" in capfd.readouterr().err
