"""Processes that end when another one does, however that one ends.

A process that is killed with SIGKILL tells nobody. Its pidfd becomes readable all the same, so a thread that waits for
the pidfd of the launcher (or of a rank) knows at once, without asking the process itself to do anything.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping

PARENT_VARIABLE = "KFDIST_PARENT_PID"
"""Environment variable with the process id of the launcher; a process that has it ends when the launcher does."""

LAUNCH_VARIABLE = "KFDIST_LAUNCH"
"""Environment variable that marks every process of one launch, inherited by their children (Ray's daemons included)."""

_POLL_SECONDS = 0.5


def watch_process(pid: int, on_exit: Callable[[], None]) -> None:
    """Calls `on_exit` once, from a daemon thread, as soon as process `pid` has ended.

    Returns at once. A process that has already ended (or never was) counts as ended. The pidfd is taken before this
    function returns, so a later process of the same number can't be mistaken for this one.

    Args:
        pid: Process to watch; it need not be a child or the parent.
        on_exit: What to do; runs in its own thread.

    Raises:
        ValueError: `pid` isn't positive.
    """
    if pid <= 0:
        raise ValueError(f"pid must be positive, got {pid}")
    descriptor, ended = None, False
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        ended = True
    except (AttributeError, OSError):
        pass  # no pidfds: not Linux, an old kernel, or a sandbox that forbids them

    def run() -> None:
        if descriptor is not None:
            _wait_by_descriptor(descriptor)
        elif not ended:
            _wait_by_asking(pid)
        on_exit()

    threading.Thread(target=run, name=f"kfdist-watch-{pid}", daemon=True).start()


def exit_with_process(pid: int, status: int = 1) -> None:
    """Ends this process, without any cleanup, as soon as process `pid` has ended.

    For processes that hold nothing worth saving. One that has children or files to look after uses `watch_process`.

    Args:
        pid: Process whose end ends this one.
        status: Exit status of this process.
    """
    watch_process(pid, lambda: os._exit(status))


def terminate_with_process(pid: int, grace_seconds: float = 10.0) -> None:
    """Ends this process as soon as process `pid` has ended: politely with SIGTERM, and without asking after a grace.

    For processes that have something to put in order, such as a rank that writes a checkpoint.

    Args:
        pid: Process whose end ends this one.
        grace_seconds: How long this process may take to end by itself.
    """

    def terminate() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_seconds)
        os._exit(1)

    watch_process(pid, terminate)


def launcher_pid(environment: Mapping[str, str] | None = None) -> int | None:
    """Returns the process id of the launcher that started this process, or None if none did.

    Args:
        environment: Variables to read; this process's own by default.
    """
    value = (os.environ if environment is None else environment).get(PARENT_VARIABLE, "")
    return int(value) if value.isdecimal() and int(value) > 0 else None


def _wait_by_descriptor(descriptor: int) -> None:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    poller.poll()
    os.close(descriptor)


def _wait_by_asking(pid: int) -> None:
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        except PermissionError:
            pass  # it lives, under another user
        time.sleep(_POLL_SECONDS)
