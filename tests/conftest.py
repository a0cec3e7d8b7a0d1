"""What holds for the whole suite: one thread per process, no configuration from outside, no process left behind.

And the script of faults that each test may write.
"""

import gc
import logging
import os
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from kfdist.rpc.certificates import make_certificates
from kfdist.system.run_notices import DIRECTORY_VARIABLE
from tests.support.faults import FOLDER, Faults, written_script
from tests.support.fork_server import stop_fork_server
from tests.support.shapes import check_shapes

_MARK = "KFDIST_TEST_SESSION"
_GRACE_SECONDS = 5.0
_END_WITH_US = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")
"""Helpers of Python's own that end when the session's process does, by reading the end of a pipe."""


check_shapes()

# A slow machine is no failed property: time limits live in pytest's own timeout.
settings.register_profile("kfdist", deadline=None)
settings.load_profile("kfdist")


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts background jobs with SIGINT ignored, and children inherit that; the tests of Ctrl-C need it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Two cores are shared by several processes a test; and results are compared bit for bit.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for name in [name for name in os.environ if name.startswith("KFDIST_")]:
        del os.environ[name]
    os.environ[_MARK] = uuid.uuid4().hex
    # Set here, for the processes of fixtures of any scope to inherit.
    os.environ[FOLDER] = tempfile.mkdtemp(prefix="kfdist-faults-")
    # Runs of other sessions, and of this machine's user, are none of ours.
    os.environ[DIRECTORY_VARIABLE] = tempfile.mkdtemp(prefix="kfdist-notices-")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    gc.disable()  # hardly anything of what imports and collected tests make is garbage
    try:
        return (yield)
    finally:
        gc.enable()
        _keep_for_good()
        _pass_on_what_torch_logs()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is not None and nextitem.path != item.path:
        _keep_for_good()


def _keep_for_good() -> None:
    """Has no collection look again through what is there, such as modules: a full one would take 0.6 s at the end."""
    gc.collect()
    gc.freeze()


def _pass_on_what_torch_logs() -> None:
    """Has torch's loggers, some forty, pass on to the root's handlers what they log.

    To each logger that doesn't, pytest adds its handler, six times a test: 0.3 ms of CPU, and 0.06 where all do.
    """
    for name, logger in logging.root.manager.loggerDict.items():
        if name.partition(".")[0] == "torch" and isinstance(logger, logging.Logger):
            logger.propagate = True


def pytest_unconfigure() -> None:
    # It would end by itself, when it notices that this process has, and may be there a moment longer.
    stop_fork_server()
    shutil.rmtree(os.environ[FOLDER], ignore_errors=True)
    shutil.rmtree(os.environ[DIRECTORY_VARIABLE], ignore_errors=True)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates and a token, as `kfdist certs init` makes them; nobody may change them."""
    directory = tmp_path_factory.mktemp("certificates") / "made"
    make_certificates(directory, hosts=["localhost", "127.0.0.1"])
    return directory


@pytest.fixture
def faults() -> Iterator[Faults]:
    """The script of faults of one test; those that never happened fail it."""
    with written_script() as script:
        yield script


@pytest.fixture(autouse=True)
def logger_restored() -> Iterator[None]:
    """Undoes what a command that runs in this process does to kfdist's logger."""
    logger = logging.getLogger("kfdist")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fails the session if a process that one of its tests started still runs."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while (left := _marked_processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line("")
            reporter.write_line("processes left running by tests:", red=True)
            for pid, command in left.items():
                reporter.write_line(f"  {pid} {command}", red=True)
        if exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _marked_processes() -> dict[int, str]:
    mark = f"{_MARK}={os.environ[_MARK]}".encode()
    marked = {}
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdecimal()):
        try:
            if pid != os.getpid() and mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if command and not any(helper in command for helper in _END_WITH_US):  # a zombie has no command
                    marked[pid] = command
        except OSError:
            continue
    return marked
