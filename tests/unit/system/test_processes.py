import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from kfdist.system import processes
from kfdist.system.lifetime import LAUNCH_VARIABLE
from kfdist.system.processes import Child, Command, children_of, describe_exit, launch_processes, sweep


def _command(tmp_path: Path, script: str, **environment: str) -> Command:
    return Command(
        name="child",
        line=(sys.executable, "-c", script),
        environment={**os.environ, **environment},
        log=tmp_path / "child.log",
    )


def _wait_for(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.02)


def test_a_child_writes_to_its_log_and_tells_its_code(tmp_path: Path):
    child = Child(_command(tmp_path, "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"))
    _wait_for(lambda: child.poll() is not None)
    assert child.poll() == 3
    assert set(child.log_tail().splitlines()) == {"out", "err"}


def test_the_tail_of_a_log_leaves_out_what_an_earlier_start_wrote(tmp_path: Path):
    for word in ("first", "second"):
        child = Child(_command(tmp_path, f"print('{word}')"))
        _wait_for(lambda: child.poll() is not None)  # noqa: B023
    assert child.log_tail() == "second"
    assert (tmp_path / "child.log").read_text() == "first\nsecond\n"


def test_of_a_large_log_the_end_alone_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "_TAIL_BYTES", len("of the end\n"))
    child = Child(_command(tmp_path, "print('the beginning\\nof the end')"))
    _wait_for(lambda: child.poll() is not None)
    assert child.log_tail() == "of the end"


def test_a_child_has_a_session_of_its_own_so_that_ctrl_c_does_not_reach_it(tmp_path: Path):
    child = Child(_command(tmp_path, "import time; time.sleep(60)"))
    try:
        assert os.getsid(child.pid) == child.pid != os.getsid(0)
    finally:
        child.signal(signal.SIGKILL)
        _wait_for(lambda: child.poll() is not None)
    assert describe_exit(child.poll() or 0) == "was killed by SIGKILL"
    child.signal(signal.SIGKILL)  # a second one finds nobody and says nothing


@pytest.mark.parametrize(
    ("code", "words"), [(0, "exited with 0"), (7, "exited with 7"), (-15, "was killed by SIGTERM")]
)
def test_exit_codes_in_words(code: int, words: str):
    assert describe_exit(code) == words


# An orphan in its own session, which also wipes the mark from its environment as a title-setting process does.
_FAMILY = """
import os, subprocess, sys, time
marked = subprocess.Popen(["sleep", "300"], start_new_session=True)
orphan = subprocess.run(
    ["sh", "-c", "env -i setsid sleep 301 >/dev/null 2>&1 & echo $!"], capture_output=True, text=True
).stdout.strip()
print(marked.pid, orphan, flush=True)
time.sleep(300)
"""

_LAUNCHER = """
import os, subprocess, sys, time
from kfdist.system.processes import become_subreaper, launch_processes, sweep
assert become_subreaper()
bystander = subprocess.Popen(["sleep", "302"])
environment = {{**os.environ, "{variable}": sys.argv[2]}}
family = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=environment, stdout=subprocess.PIPE, text=True)
members = {{family.pid, *map(int, family.stdout.readline().split())}}
spared = frozenset({{bystander.pid}})
deadline = time.monotonic() + 5
while not members <= launch_processes(sys.argv[2], os.getpid(), spared) and time.monotonic() < deadline:
    time.sleep(0.05)
found = launch_processes(sys.argv[2], os.getpid(), spared)
assert members <= found and bystander.pid not in found, (members, found)
if {kill_first}:
    family.kill()
    family.wait()
assert sweep(sys.argv[2], os.getpid(), spared=spared) == set()
assert not launch_processes(sys.argv[2], os.getpid(), spared)
assert bystander.poll() is None
bystander.kill()
bystander.wait()
"""


@pytest.mark.parametrize("kill_first", [False, True])
def test_sweeping_finds_marked_processes_and_orphans_and_spares_bystanders(kill_first: bool):
    script = _LAUNCHER.format(variable=LAUNCH_VARIABLE, kill_first=kill_first)
    subprocess.run([sys.executable, "-c", script, _FAMILY, uuid.uuid4().hex], check=True, timeout=30)


def test_a_mark_finds_a_process_that_is_no_descendant():
    mark = uuid.uuid4().hex
    process = subprocess.Popen(["sleep", "300"], env={**os.environ, LAUNCH_VARIABLE: mark})
    _wait_for(lambda: process.pid in launch_processes(mark, root=2**22 + 1))
    assert process.pid in children_of(os.getpid())
    assert sweep(mark, root=2**22 + 1) == set()
    assert process.wait(30) == -signal.SIGKILL
