import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from kfdist.system.lifetime import launcher_pid, watch_process


def test_watching_tells_when_a_process_ends_and_not_before():
    process = subprocess.Popen(["sleep", "60"])
    ended = threading.Event()
    watch_process(process.pid, ended.set)
    assert not ended.wait(0.2)
    process.kill()
    assert ended.wait(30)
    process.wait()


def test_a_process_that_has_ended_already_counts_as_ended():
    process = subprocess.Popen(["true"])
    process.wait()
    ended = threading.Event()
    watch_process(process.pid, ended.set)
    assert ended.wait(30)


@pytest.mark.parametrize("pid", [0, -1])
def test_a_process_group_is_no_process(pid: int):
    with pytest.raises(ValueError, match="positive"):
        watch_process(pid, lambda: None)


_POLITE = """
import signal, sys, time
from kfdist.system.lifetime import terminate_with_process
def handle(*_):
    print("polite", flush=True)
    {after}
signal.signal(signal.SIGTERM, handle)
terminate_with_process(int(sys.argv[1]), grace_seconds=1.0)
print("ready", flush=True)
while True:
    time.sleep(0.1)
"""


@pytest.mark.parametrize(("after", "code"), [("sys.exit(7)", 7), ("", 1)], ids=["in time", "killed after the grace"])
def test_a_process_ends_with_its_launcher_politely_first(after: str, code: int):
    launcher = subprocess.Popen(["sleep", "60"])
    child = subprocess.Popen(
        [sys.executable, "-c", _POLITE.format(after=after), str(launcher.pid)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    started = time.monotonic()
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    assert child.stdout.readline() == "polite\n"
    assert child.wait(10) == code
    assert time.monotonic() - started < 5
    child.stdout.close()


def test_a_process_without_manners_ends_at_once():
    launcher = subprocess.Popen(["sleep", "60"])
    script = (
        "import sys, time; from kfdist.system.lifetime import exit_with_process; "
        "exit_with_process(int(sys.argv[1]), 3); print('ready', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(launcher.pid)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    launcher.kill()
    launcher.wait()
    assert child.wait(30) == 3
    child.stdout.close()


@pytest.mark.parametrize(
    ("value", "pid"),
    [("123", 123), ("", None), ("0", None), ("-5", None), ("x", None), (str(os.getpid()), os.getpid())],
    ids=["number", "empty", "zero", "negative", "word", "own"],
)
def test_the_launcher_is_read_from_the_environment(value: str, pid: int | None):
    assert launcher_pid({"KFDIST_PARENT_PID": value}) == pid


def test_without_a_launcher_there_is_none():
    assert launcher_pid({}) is None
