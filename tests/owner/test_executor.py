"""The process that inverts: its results, its death, its deadline."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kfdist.curvature.jobs import fingerprint
from kfdist.owner.executor import ChildCrashed, DeadlineExceeded, Executor, PayloadRefused
from tests.support.faults import EACH, Faults
from tests.support.faulty import child
from tests.support.jobs import payload, result_of
from tests.support.waits import eventually

ROOT = Path(__file__).parents[2]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


@pytest.fixture(scope="module")
def faulty() -> Iterator[Executor]:
    """An executor under the scripts of faults; one for all tests, as torch takes long to load."""
    executor = Executor(threads=1, module=child.__name__)
    yield executor
    executor.close()


@pytest.fixture
def executor(faulty: Executor, faults: Faults) -> Executor:
    del faults  # cleared after each test
    faulty.fingerprint()
    return faulty


@pytest.mark.parametrize("method", ["kfac", "kfac-eigen", "rs-kfac"])
def test_a_result_has_the_bytes_that_this_process_gets(executor, method):
    data = payload(48, seed=3, method=method)
    execution = executor.run(data, 60.0)
    assert execution.result == result_of(data)
    assert 0 < execution.seconds < 60


def test_a_large_payload_goes_both_ways(executor):
    data = payload(512, blocks=8, seed=1)
    assert len(data) > 8 << 20
    assert executor.run(bytearray(data), 60.0).result == result_of(data)


def test_its_fingerprint_is_that_of_a_process_like_it(executor):
    assert executor.fingerprint() == fingerprint("cpu", 1)


def test_a_deadline_kills_the_process_and_the_next_one_is_as_good(executor, faults):
    faults.at(inversion=EACH, times=1).delay(60)
    pid, begun = executor.pid, time.monotonic()
    with pytest.raises(DeadlineExceeded, match="longer than its deadline of 0.5 s and was killed"):
        executor.run(payload(), 0.5)
    assert time.monotonic() - begun < 50
    assert not is_alive(pid)
    assert executor.run(payload(), 60.0).result == result_of(payload())


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSEGV, marks=pytest.mark.slow)])
def test_a_crash_in_the_middle(executor, faults, number):
    faults.at(inversion=EACH, times=1).kill(number)
    pid = executor.pid
    with pytest.raises(ChildCrashed, match=f"was killed by {number.name} in the middle"):
        executor.run(payload(), 60.0)
    assert executor.run(payload(), 60.0).result == result_of(payload())
    assert executor.pid != pid


def test_a_stopped_process_meets_its_deadline(executor):
    os.kill(executor.pid, signal.SIGSTOP)
    with pytest.raises(DeadlineExceeded):
        executor.run(payload(512, blocks=8, seed=1), 0.5)  # more than fits into a pipe


def test_a_payload_that_is_none_is_refused_and_costs_no_process(executor):
    pid = executor.pid
    with pytest.raises(PayloadRefused, match="is no kfdist job"):
        executor.run(b"nonsense", 60.0)
    assert executor.run(payload(), 60.0).result == result_of(payload())
    assert executor.pid == pid


def test_who_asks_for_the_fingerprint_and_who_runs_may_come_together(executor):
    os.kill(executor.pid, signal.SIGKILL)
    with pytest.raises(ChildCrashed):
        executor.run(payload(), 60.0)
    asked: list[str] = []
    threads = [threading.Thread(target=lambda: asked.append(executor.fingerprint())) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert executor.run(payload(), 60.0).result == result_of(payload())
    for thread in threads:
        thread.join()
    assert asked == [fingerprint("cpu", 1)] * 3


def test_a_process_that_cannot_start_says_how_it_ended():
    executor = Executor(threads=1, module="kfdist.no_such_module")
    with pytest.raises(ChildCrashed, match="exited with 1 before it was ready"):
        executor.fingerprint()
    executor.close()
    with pytest.raises(ChildCrashed):
        executor.run(payload(), 1.0)


def test_a_job_tells_of_its_own_fault_where_no_next_process_can_be_started(executor, faults, monkeypatch):
    faults.at(inversion=EACH, times=1).delay(60)

    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", refuse)
        with pytest.raises(DeadlineExceeded):
            executor.run(payload(), 0.5)
        with pytest.raises(ChildCrashed, match="can be started: .*temporarily unavailable"):
            executor.run(payload(), 60.0)
    assert executor.run(payload(), 60.0).result == result_of(payload())


def test_the_process_ends_with_its_owner_even_in_the_middle_of_an_inversion(faults):
    inversion = faults.at(inversion=EACH, times=1).delay(60)
    script = f"""
import sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from kfdist.owner.executor import Executor
from tests.support.jobs import payload
executor = Executor(threads=1, module={child.__name__!r})
executor.fingerprint()
print(executor.pid, flush=True)
executor.run(payload(), 60.0)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        eventually(lambda: inversion.fired, bool)
        assert is_alive(pid)
        owner.kill()
    eventually(lambda: is_alive(pid), lambda alive: not alive, seconds=20.0)


def test_an_owner_for_a_gpu_where_there_is_none_says_so(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    executor = Executor(threads=1, device="cuda", gpu_share=0.5)
    with pytest.raises(
        ChildCrashed, match=r"sees no GPU \(CUDA_VISIBLE_DEVICES is ''\); set cluster\.bundle\.gpus = 0"
    ):
        executor.fingerprint()
    executor.close()
