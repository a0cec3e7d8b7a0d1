"""A courier that dies, stops or is signalled, and a rank that does: jobs keep their results, processes don't stay."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kfdist.control.control_records import RunState
from kfdist.links.rank.remote import RemoteLink
from kfdist.rpc.beats import BEAT_SECONDS
from kfdist.types import InForce
from tests.support.jobs import collect, context, job, payload, result_of
from tests.support.waits import eventually

ROOT = Path(__file__).parents[2]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def wait_for_courier(link: RemoteLink, *, epoch: int = 1) -> int:
    """Returns the courier's process id once it works."""
    link.submit(job("warm", version=time.time_ns(), epoch=epoch))
    collect(link, 1)
    return link.courier_pid


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_courier_in_the_middle_of_jobs(controller, owners, start_link, number, caplog):
    del owners
    link = start_link(controller.address, silent_seconds=1.5, window=8)
    first = wait_for_courier(link)
    jobs = [job(f"group{i}", data=payload(256, seed=i, method="kfac-eigen")) for i in range(24)]
    for each in jobs:
        link.submit(each)
    link.wait(30)  # work is under way
    os.kill(first, number)
    results = collect(link, 24, seconds=60)
    for each in jobs:
        assert results[each.group, 0].payload == result_of(each.payload)
    assert link.courier_pid != first
    assert not is_alive(first)
    counters = link.counters()
    assert counters.courier_restarts == 1
    assert counters.resubmissions["courier_lost"] >= 1
    how = "ended" if number == signal.SIGKILL else "was silent"
    assert f"courier {first} of rank 0 {how}" in caplog.text.replace("closed its socket", "ended")


def test_the_next_courier_says_where_a_rank_stands_that_tells_nothing_new(controller, start_link):
    with controller.client() as client:
        client.create("paused")
        link = start_link(controller.address, as_told=replace(context(), run="paused"))
        link.report(InForce(values={"damping": 0.5}))
        link.beat(41, "paused", [])
        eventually(lambda: client.get("paused"), lambda run: run.state is RunState.PAUSED)
        os.kill(link.courier_pid, signal.SIGKILL)
        eventually(lambda: list(client.events("paused"))[-1].kind, lambda kind: kind == "worker_registered")
        time.sleep(2 * BEAT_SECONDS)
        run = client.get("paused")
        assert (run.state, run.step, run.settings) == (RunState.PAUSED, 41, {"damping": 0.5})
        assert "running" not in [event.kind for event in client.events("paused")]


@pytest.mark.slow
def test_couriers_killed_over_and_over(controller, owners, start_link):
    del owners
    link = start_link(controller.address)
    jobs = [job(f"group{i}", data=payload(64, seed=i)) for i in range(30)]
    killed = 0
    for number, each in enumerate(jobs):
        link.submit(each)
        if number % 10 == 9:
            # Sometimes before it has greeted, sometimes in the middle of a job.
            killed = eventually(lambda: link.courier_pid, lambda pid, killed=killed: pid != killed)
            time.sleep(0.1 * number / 10)
            os.kill(killed, signal.SIGKILL)
    results = collect(link, 30, seconds=60)
    assert all(results[each.group, 0].payload == result_of(each.payload) for each in jobs)
    assert link.counters().courier_restarts == 3


def test_signals_to_the_whole_group_leave_the_courier_alone(controller, owners, start_link):
    del owners
    link = start_link(controller.address)
    pid = wait_for_courier(link)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)
    link.submit(job("after", data=payload(16, seed=9)))
    collect(link, 1)
    assert link.courier_pid == pid
    assert os.getsid(pid) == pid  # a session of its own: no Ctrl-C of a terminal reaches it
    link.close()
    assert not is_alive(pid)


def test_the_courier_loads_neither_torch_nor_ray(controller, owners, start_link):
    del owners
    link = start_link(controller.address)
    mapped = Path(f"/proc/{wait_for_courier(link)}/maps").read_text()
    assert "grpc" in mapped
    assert not re.search(r"/(torch|ray|libtorch\w*|_raylet\w*)[/.]", mapped)


def test_the_courier_ends_when_its_rank_is_killed(controller, owners):
    del owners
    script = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from kfdist.control.control_records import RunState
from kfdist.links.rank.remote import RemoteLink
from kfdist.rpc.beats import BEAT_SECONDS
from kfdist.types import InForce
from tests.support.jobs import collect, context, job
link = RemoteLink({controller.address!r})
link.start(context(epoch=5))
link.submit(job(epoch=5))
collect(link, 1)
child = os.fork()  # like a data loader's worker, which may outlive its rank and holds copies of all descriptors
if child:
    print(link.courier_pid, child, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        courier, child = (int(word) for word in rank.stdout.readline().split())
        assert is_alive(courier)
        rank.kill()
        rank.wait()
        try:
            eventually(lambda: is_alive(courier), lambda alive: not alive, seconds=20.0)
            assert is_alive(child)
        finally:
            os.kill(child, signal.SIGKILL)


def test_ctrl_c_in_a_wait_breaks_nothing(controller, owners, start_link):
    del owners
    link = start_link(controller.address, as_told=context(epoch=6))
    for version in range(5):
        link.submit(job("group", version=version, data=payload(200, seed=version), epoch=6))
        timer = subprocess.Popen(["sh", "-c", f"sleep 0.05; kill -INT {os.getpid()}"])
        with pytest.raises(KeyboardInterrupt):
            while True:
                link.wait(5.0)
        timer.wait()
    results = collect(link, 5)
    assert all(results["group", version].payload == result_of(payload(200, seed=version)) for version in range(5))
    assert link.counters().courier_restarts == 0


def test_a_signal_handler_runs_during_a_wait_and_the_wait_goes_on(controller, start_link):
    link = start_link(controller.address, as_told=context(epoch=6))
    heard: list[float] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(time.monotonic()))
    try:
        begun = time.monotonic()
        timer = subprocess.Popen(["sh", "-c", f"sleep 0.2; kill -USR1 {os.getpid()}"])
        link.wait(3.0)
        ended = time.monotonic()
        timer.wait()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(heard) == 1
    assert 0.15 < heard[0] - begun < 2.5  # at once, not at the end of the wait
    assert ended - begun >= 2.99
