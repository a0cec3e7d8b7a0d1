"""What a launch leaves behind: directories, logs, the summary, and the error that a dead child explains."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kfdist.errors import ConfigError, EnvironmentFault, ExitCode, KfdistError
from kfdist.system.files import lock_holder, replace_file
from kfdist.system.lifetime import PARENT_VARIABLE
from kfdist.system.processes import Child, describe_exit
from kfdist.system.run_summary import read_summary
from kfdist.system.spawn import inherited_environment, module_command

REPORT_SECONDS = 30.0
"""How long the page about a run may take that the launcher makes at the end."""

_LAST_EVENTS_BYTES = (1 << 20, 1 << 26)
"""How much of the end of metrics.jsonl is searched for checkpoints: more only where there is none in less, as with many
steps between two, each with a line."""


def child_fault(child: Child, code: int, when: str, advice: str = "") -> KfdistError:
    """Returns the error for a child's end: the child's last message if it wrote one, else the end of its log.

    Args:
        child: A process that has ended.
        code: How it ended, as `Child.poll` returns it.
        when: When it ended, such as "while training".
        advice: What to do, and what else is known, if it gave no reason.
    """
    tail = child.log_tail()
    _, marker, message = f"\n{tail}".rpartition("\nkfdist: ")
    if not marker:
        message = ""
    if message and code == ExitCode.BAD_INPUT:
        return ConfigError(message)
    if message and code == ExitCode.ENVIRONMENT:
        return EnvironmentFault(f"{message}\n(said by {child.name})")
    name = child.name if child.name.startswith("rank") else f"the {child.name}"
    last = f"the end of its log ({child.command.log}):\n{tail}" if tail else "its log is empty"
    return EnvironmentFault("\n".join(filter(None, [f"{name} {describe_exit(code)} {when}; {last}", advice])))


def last_words(child: Child) -> str:
    """Says how the log ends of a child that had to be killed; empty if there is nothing in it."""
    tail = child.log_tail().rpartition("\n")[2]
    return f"{child.name} didn't end by itself; its log ends with: {tail}" if tail else ""


def remove_untrained(made: Sequence[Path], *, unless_trained: Path) -> None:
    """Removes the directories of a launch that never trained, with the files of its services.

    Args:
        made: What `make_directory` made.
        unless_trained: The run directory; with a checkpoint or a line of metrics in it, everything stays. A run that
            was stopped in the wait of its first step has both, but nothing that a new one doesn't make again.
    """
    if is_held(unless_trained):
        return  # another launch began here at the same moment, and goes on
    summary = read_summary(unless_trained)
    stopped_at_once = summary.get("status") == "stopped" and summary.get("steps") == 0
    traces = (unless_trained / "checkpoints", unless_trained / "metrics.jsonl")
    if not stopped_at_once and any(trace.exists() for trace in traces):
        return
    for directory in made:
        if directory in unless_trained.parents:
            with contextlib.suppress(OSError):
                directory.rmdir()  # unless others have put something into it
        else:
            shutil.rmtree(directory, ignore_errors=True)


def is_held(run_directory: Path, locks: str = "*lock") -> bool:
    """Tells whether a trainer ("lock") or a controller (another that `locks` matches) has its lock there."""
    try:
        return any(lock_holder(lock) is not None for lock in run_directory.glob(locks))
    except OSError:
        return True  # whose it is can't be told


def add_to_summary(run_directory: Path, **entries: Any) -> dict[str, Any]:
    """Adds what only the launcher knows to `summary.json`, and returns the whole; empty if there is none."""
    summary = read_summary(run_directory)
    if summary:
        summary |= entries
        replace_file(run_directory / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    return summary


def ending_of(summary: Mapping[str, Any], *, failed: str, ended: str) -> dict[str, str]:
    """Returns what the launcher adds to a summary about the run's end: what ranks that were killed couldn't tell.

    Args:
        summary: As the ranks left it.
        failed: Why the launch failed; empty if it didn't.
        ended: How ranks ended that were asked to stop, if not as asked.
    """
    cause = failed.partition("\n")[0].removesuffix(":") or ended
    if not cause:
        return {}
    if failed and summary.get("status") == "running":
        return {"status": "failed", "error": cause}
    return {"ended": cause} if cause not in str(summary.get("error", "")) else {}


def report_line(run_directory: Path, *, unless: Callable[[], bool]) -> str:
    """Writes the page about a run and says where it is, or why there is none; empty where nothing was recorded.

    Args:
        run_directory: The run's.
        unless: Tells whether to give up, with nothing to say; asked again and again.
    """
    if unless() or not (run_directory / "metrics.jsonl").exists():
        return ""
    try:
        fault = _report(run_directory, unless)
    except (OSError, KfdistError) as error:  # whatever it is, the run has ended as it has
        fault = str(error)
    if fault is None:
        return ""
    if not fault:
        return f"report: {run_directory / 'report.html'}"
    return f"no report ({' '.join(fault.split())}); `kfdist report {run_directory}` tries again"


def _report(run_directory: Path, unless: Callable[[], bool]) -> str | None:
    """Runs `kfdist report`; returns what went wrong, empty if nothing did, None if it was given up."""
    deadline = time.monotonic() + REPORT_SECONDS
    with subprocess.Popen(
        module_command("kfdist", "report", str(run_directory.absolute())),
        env={**inherited_environment(os.environ), PARENT_VARIABLE: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            while not (stopped := unless()) and time.monotonic() < deadline:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    said = process.communicate(timeout=0.05)[1].decode(errors="replace")
                    message = said.rpartition("kfdist: ")[2].strip() or describe_exit(process.returncode)
                    return message if process.returncode else ""
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
    return None if stopped else f"it took more than {REPORT_SECONDS:g} s"


def longest_checkpoint(run_directory: Path) -> float:
    """Returns the seconds that the longest of a run's last checkpoints took; 0 if it has written none."""
    try:
        with (run_directory / "metrics.jsonl").open("rb") as file:
            for size in _LAST_EVENTS_BYTES:
                file.seek(max(0, file.seek(0, os.SEEK_END) - size))
                if seconds := max(map(_checkpoint_seconds, file), default=0.0):
                    return seconds
    except OSError:
        pass
    return 0.0


def _checkpoint_seconds(line: bytes) -> float:
    if line.startswith(b'{"event": "checkpoint"'):
        with contextlib.suppress(ValueError):  # the last may be half written
            return float(json.loads(line).get("seconds", 0.0))
    return 0.0
