"""The link with a real courier, real owners and a real controller, while nothing goes wrong but the input."""

import itertools
import os
import re
import time
from dataclasses import replace

import pytest

from kfdist.errors import EnvironmentFault
from kfdist.links.rank.remote import RemoteLink
from kfdist.system.memory import FreeMemory
from kfdist.types import Desired, MetricSample
from tests.support.controller import values
from tests.support.jobs import RUN, collect, context, job, payload, result_of
from tests.support.waits import eventually


def test_results_are_those_of_this_process(controller, owners, start_link, monkeypatch):
    del owners
    passed: list[int] = []
    monkeypatch.setattr(FreeMemory, "passed", lambda _free, size: passed.append(size))
    link = start_link(controller.address)
    jobs = [job(f"group{i}", data=payload(16 + i, seed=i, method="kfac-eigen")) for i in range(20)]
    for each in jobs:
        link.submit(each)
    results = collect(link, 20)
    for each in jobs:
        result = results[each.group, 0]
        assert result.payload == result_of(each.payload)
        assert result.owner in {"owner-0", "owner-1"}
        assert 0 < result.seconds < 30
    assert {result.owner for result in results.values()} == {"owner-0", "owner-1"}
    counters = eventually(link.counters, lambda seen: seen.bytes_received > 0)
    assert counters.resubmissions == {}
    assert counters.bytes_sent == sum(len(each.payload) for each in jobs)
    assert counters.bytes_received == sum(len(result.payload) for result in results.values())
    assert sum(passed) == counters.bytes_sent + counters.bytes_received


def test_a_group_goes_to_its_assigned_owner(controller, owners, start_link):
    del owners
    groups = {"x": 8.0, "y": 4.0, "z": 2.0}
    link = start_link(controller.address, as_told=context(groups=groups))
    versions = itertools.count()

    def owners_of_next() -> dict[str, str | None]:
        version = next(versions)
        for group in groups:
            link.submit(job(group, version=version))
        results = collect(link, len(groups))
        return {group: results[group, version].owner for group in groups}

    # Until the courier has the assignment it chooses by itself; then by round robin over groups sorted by cost.
    first = eventually(owners_of_next, lambda used: used["x"] == used["z"] != used["y"])
    assert [owners_of_next() for _ in range(3)] == [first] * 3


def test_commands_come_and_beats_go(controller, owners, start_link):
    del owners
    link = start_link(controller.address, as_told=context(epoch=2))
    assert link.settings().desired is Desired.RUNNING
    link.beat(41, "running", [MetricSample(name="kfdist_loss", value=0.5)])
    with controller.client() as client:
        eventually(lambda: client.get(RUN).step, lambda step: step == 41)
        eventually(lambda: values(controller.scrape()).get(f'kfdist_loss{{run="{RUN}"}}'), lambda loss: loss == 0.5)
        client.pause(RUN)
        eventually(link.settings, lambda settings: settings.desired is Desired.PAUSED)
        revision = link.settings().revision
        client.update_settings(RUN, damping=0.25)
        settings = eventually(link.settings, lambda settings: settings.changes == {"damping": 0.25})
        assert settings.revision > revision
        client.resume(RUN)
        eventually(link.settings, lambda settings: settings.desired is Desired.RUNNING)
        link.beat(42, "finished", [])
        link.close()
        assert client.get(RUN).step == 42  # the last beat is told before the courier ends
        assert client.get(RUN).state == "finished"


def test_the_first_event_of_a_resumed_start_names_the_step_that_it_goes_on_with(controller, start_link):
    start_link(controller.address, as_told=replace(context(), run="resumed", step=50))
    with controller.client() as client:
        eventually(
            lambda: [run.state for run in client.runs() if run.name == "resumed"], lambda seen: seen == ["running"]
        )
        texts = [event.text for event in client.events("resumed") if event.kind == "running"]
        assert texts == ["created -> running at step 50"] and client.get("resumed").step == 50


def test_many_samples_are_told_in_parts(controller, owners, start_link):
    del owners
    link = start_link(controller.address, as_told=context(epoch=3))
    samples = [MetricSample(name="kfdist_staleness_steps", value=i, labels={"block": f"block{i}"}) for i in range(5000)]
    link.beat(1, "running", samples)
    # The controller shows so many blocks by name and the maximum of all others as one.
    others = f'kfdist_staleness_steps{{block="other",run="{RUN}"}}'
    eventually(lambda: values(controller.scrape()).get(others), lambda seen: seen == 4999)
    assert link.counters().samples_dropped == 0


def test_shared_memory_and_descriptors_come_back(controller, owners, start_link):
    del owners
    link = start_link(controller.address, as_told=context(epoch=3))

    def descriptors(pid: int) -> list[str]:
        return [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]

    link.submit(job("first", epoch=3))
    collect(link, 1)
    before = len(descriptors(link.courier_pid)), len(os.listdir("/proc/self/fd"))
    for version in range(1, 40):
        link.submit(job("group", version=version, epoch=3))
    collect(link, 39)
    after = len(descriptors(link.courier_pid)), len(os.listdir("/proc/self/fd"))
    assert after[0] <= before[0] + 1  # listdir may catch a connection that is coming or going
    assert after[1] <= before[1] + 1
    assert not any(re.search("kfdist-(input|output)", name) for name in descriptors(link.courier_pid))


def test_a_job_submitted_twice_is_refused(controller, owners, start_link):
    del owners
    link = start_link(controller.address, as_told=context(epoch=3))
    link.submit(job("twice", epoch=3))
    with pytest.raises(ValueError, match="group 'twice' version 0 was submitted and has no result yet"):
        link.submit(job("twice", epoch=3))
    collect(link, 1)
    link.submit(job("twice", epoch=3))
    collect(link, 1)


def test_a_corrupted_result_is_never_announced(controller, owners, start_link, faults):
    del owners
    faults.at(written=1).corrupt()
    link = start_link(controller.address, as_told=context(epoch=3), courier_module="tests.support.faulty.courier")
    data = payload(24, seed=5)
    link.submit(job("precious", data=data, epoch=3))
    (result,) = collect(link, 1).values()
    assert result.payload == result_of(data)
    assert link.counters().resubmissions == {"corrupt": 1}


def test_calls_out_of_order(controller, start_link):
    link = RemoteLink(controller.address)
    with pytest.raises(RuntimeError, match="isn't started"):
        link.poll()
    assert link.counters().courier_restarts == 0
    assert link.settings().desired is Desired.RUNNING
    link.close()
    link = start_link(controller.address, as_told=context(epoch=3))
    with pytest.raises(RuntimeError, match="started before"):
        link.start(context())
    link.close()
    link.close()
    with pytest.raises(RuntimeError, match="closed"):
        link.submit(job())


def test_wait_returns_at_once_when_something_is_there_and_in_time_when_not(controller, owners, start_link):
    del owners
    link = start_link(controller.address, as_told=context(epoch=3))
    begun = time.monotonic()
    link.wait(0.3)
    assert 0.29 < time.monotonic() - begun < 20
    link.submit(job("one", epoch=3))
    link.submit(job("two", epoch=3))
    link.wait(30)
    results = link.poll()
    while len(results) < 2:
        link.wait(30)
        results += link.poll()
    begun = time.monotonic()
    assert link.poll() == []
    link.wait(0.0)
    assert time.monotonic() - begun < 20


def test_a_machine_that_cannot_start_a_courier_says_so(monkeypatch):
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    link = RemoteLink("127.0.0.1:1")
    with pytest.raises(EnvironmentFault, match="can't start a courier.*No such file"):
        link.start(context())
    link.close()


def test_couriers_that_all_end_at_their_start_are_given_up(start_link, capfd):
    link = start_link("127.0.0.1:1", courier_module="kfdist.no_such_module", failed_starts=3)
    with pytest.raises(EnvironmentFault, match="3 couriers in a row ended before they had started"):
        eventually(lambda: (link.wait(0.1), link.poll())[1], bool)
    assert "No module named kfdist.no_such_module" in capfd.readouterr().err
