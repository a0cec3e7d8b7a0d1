"""Supervision of the controller and the pool: others wait until they serve, and they are restarted when they die."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kfdist.errors import EnvironmentFault
from kfdist.system.files import read_ready_file
from kfdist.system.processes import Child, Command, describe_exit

RESTARTS_ALLOWED = 5
"""How often a process is started again within one launch before the launcher gives up on it."""

_FIRST_PAUSE_SECONDS = 0.25
_RETRY_SECONDS = 5.0
"""Between attempts to start a process that the system refuses; they don't count as restarts."""


class SupervisedProcess:
    """A supervised process with a ready file, which it writes, as JSON, once it serves.

    Attributes:
        child: The process, or None while it waits to be started again.
        restarts: How often it was started again.
        gave_up: Whether it died once more than `RESTARTS_ALLOWED`.
    """

    def __init__(self, make_command: Callable[[int], Command], ready_file: Path) -> None:
        """Starts the process.

        Args:
            make_command: Returns how to start it, given the number of earlier restarts.
            ready_file: The file it was told to write once it serves.
        """
        self.restarts = 0
        self.gave_up = False
        self._make_command = make_command
        self._ready_file = ready_file
        self._start_at = 0.0
        self._obstacle = ""
        self._past: list[Mapping[str, Any]] = []
        self._command = make_command(0)
        self.child: Child | None = Child(self._command)

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self._command.name

    def ready(self) -> Mapping[str, Any] | None:
        """Returns what the newest process wrote to its ready file, or None if it doesn't serve yet."""
        return read_ready_file(self._ready_file)

    def reports(self) -> list[Mapping[str, Any]]:
        """Returns what each process of this launch last wrote to the ready file, the newest last."""
        newest = self.ready()
        return [*self._past, newest] if newest is not None else list(self._past)

    def supervise(self) -> str | None:
        """Starts the process again if it died, after a pause that doubles; to be called often.

        Returns:
            What happened, as a message, or None.
        """
        if self.child is None:
            if self.gave_up or time.monotonic() < self._start_at:
                return None
            try:
                self._command = self._make_command(self.restarts)
                self.child = Child(self._command)
            except (OSError, EnvironmentFault) as error:
                # The run isn't over for it: a full disk or a lack of descriptors may pass.
                self._start_at = time.monotonic() + _RETRY_SECONDS
                told, self._obstacle = self._obstacle, str(error)
                if self._obstacle == told:
                    return None
                return f"the {self.name} can't be started again ({error}); trying every {_RETRY_SECONDS:g} s"
            self._obstacle = ""
            return f"the {self.name} was started again ({self.restarts} of at most {RESTARTS_ALLOWED} times)"
        code = self.child.poll()
        if code is None:
            return None
        self.child = None
        if (last := self.ready()) is not None:
            self._past.append(last)
        self._ready_file.unlink(missing_ok=True)
        ended = f"the {self.name} {describe_exit(code)} (log: {self._command.log})"
        if self.restarts == RESTARTS_ALLOWED:
            self.gave_up = True
            return f"{ended}; it isn't started again, because that was tried {RESTARTS_ALLOWED} times"
        self._start_at = time.monotonic() + _FIRST_PAUSE_SECONDS * 2**self.restarts
        self.restarts += 1
        return ended
