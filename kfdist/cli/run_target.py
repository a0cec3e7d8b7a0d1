"""The run that a command is about: its controller, its files, and what can't be asked of it any more."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from kfdist.cli.run_files import RunFiles
from kfdist.config import security_from_environment
from kfdist.control.client import ControlClient, RunView
from kfdist.control.control_records import RunState
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.rpc.channels import CALL_SECONDS
from kfdist.system.credentials import Credentials, Role

_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A controller: where it serves, and where the files are that it wants to be shown."""

    address: str
    certificates: str | None = None
    token_file: str | None = None

    def client(self, *, seconds: float = CALL_SECONDS) -> ControlClient:
        """Prepares calls with a deadline. `KFDIST_SECURITY__*` come first."""
        configured = security_from_environment().credentials(Role.CLIENT)
        found = Credentials.at(Role.CLIENT, self.certificates or None, self.token_file or None)
        return ControlClient(self.address, configured or found, timeout_seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class Target:
    """The run that a command is about.

    Attributes:
        name: Its name.
        controller: Its controller; None if it has none any more, or never had one.
        files: Its directory, if this machine has it.
        start: Which of the run's starts the controller must know; 0 if any.
    """

    name: str
    controller: Endpoint | None = None
    files: RunFiles | None = None
    start: int = 0

    @contextmanager
    def client(self) -> Iterator[ControlClient]:
        """Connects to its controller.

        Raises:
            ConfigError: It has ended, and with it its controller.
            EnvironmentFault: It trains without a controller, or where another one listens now.
        """
        if self.controller is None:
            raise _uncontrolled(self)
        with self.controller.client() as client:
            if self.start and (known := client.get(self.name)).epoch != self.start:
                raise EnvironmentFault(
                    f"the controller at {client.address} knows another run {self.name!r}, at its start {known.epoch}: "
                    f"that of {self.files and self.files.path} was at start {self.start} and has no controller any more"
                )
            yield client

    def ended_view(self, client: ControlClient, *, timeout_seconds: float) -> RunView:
        """Waits until the run has ended, or its ranks are gone, and returns it.

        A controller that ends with its launch may be gone before it was asked; then the run's files tell.

        Raises:
            EnvironmentFault: It takes longer than `timeout_seconds`, or nobody can tell any more.
        """
        ends = time.monotonic() + timeout_seconds
        while True:
            try:
                run = self.view(client)
            except EnvironmentFault:
                if self.files is None:
                    raise
                run = self.files.again().view()
            if run.state.ended or run.state is RunState.LOST:
                return run
            if time.monotonic() > ends:
                raise EnvironmentFault(
                    f"run {self.name!r} is still {run.state} at step {run.step} after {timeout_seconds:g} s; "
                    "`kfdist events` says what happened"
                )
            time.sleep(_POLL_SECONDS)

    def view(self, client: ControlClient) -> RunView:
        """Asks how the run is."""
        return self.located(client.get(self.name))

    def located(self, run: RunView) -> RunView:
        """Returns a run with its directory, where the controller wasn't told."""
        directory = run.directory or (str(self.files.path.absolute()) if self.files is not None else "")
        return replace(run, directory=directory)


def _uncontrolled(target: Target) -> ConfigError | EnvironmentFault:
    assert target.files is not None
    files = target.files
    if files.trainer:
        return EnvironmentFault(
            f"run {target.name!r} in {files.path} is trained by {files.trainer}, and no controller of it can be "
            f"reached from here. If it has one, ask on that machine or name it with --controller; if not, only a "
            f"signal stops it: kill -TERM {files.trainer_pid} on that machine has all ranks write a checkpoint and end"
        )
    when = f", {files.heard.astimezone():%Y-%m-%d %H:%M}" if files.heard is not None else ""
    return ConfigError(f"run {target.name!r} in {files.path} has ended ({files.standing()}{when}); {files.advice()}")
