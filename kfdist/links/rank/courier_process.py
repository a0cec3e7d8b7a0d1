"""The courier as its rank sees it: spawning it, watching it, ending it."""

import contextlib
import os
import select
import signal
import socket
import subprocess
from collections.abc import Mapping

from kfdist.errors import EnvironmentFault
from kfdist.links.shared_memory import HeartbeatWord
from kfdist.links.socket_messages import CourierSetup
from kfdist.system.spawn import module_command, with_package

COURIER_MODULE = "kfdist.links.courier"


class CourierProcess:
    """One running courier.

    Attributes:
        channel: Our end of the socket pair, non-blocking.
        exit_descriptor: Becomes readable when the courier has ended (a pidfd; end of file on `channel` isn't enough,
            because data loaders forked from the rank hold copies of its descriptors).
    """

    def __init__(self, setup: CourierSetup, environment: Mapping[str, str], module: str = COURIER_MODULE) -> None:
        """Starts a courier; returns before it has imported anything.

        Args:
            setup: What it is told.
            environment: Its environment variables.
            module: What to run.

        Raises:
            EnvironmentFault: No process can be started.
        """
        with contextlib.ExitStack() as passed, contextlib.ExitStack() as kept:
            try:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                kept.callback(ours.close)
                passed.callback(theirs.close)
                passed.callback(os.close, word := HeartbeatWord.create())
                passed.callback(os.close, told := setup.write())
                self._process = subprocess.Popen(
                    module_command(module, str(theirs.fileno()), str(word), str(told)),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=with_package(environment),
                    pass_fds=(theirs.fileno(), word, told),
                    start_new_session=True,
                )
                self.exit_descriptor = self._open_exit_descriptor()
                kept.callback(os.close, self.exit_descriptor)
                self._word = HeartbeatWord(word)
            except OSError as error:
                raise EnvironmentFault(f"can't start a courier ({error}); kfdist needs Linux 5.3 or later") from error
            kept.pop_all()
        ours.setblocking(False)
        self.channel = ours
        self.greeted = False
        self._ended = False

    def _open_exit_descriptor(self) -> int:
        try:
            return os.pidfd_open(self._process.pid)
        except OSError:
            self._process.kill()
            self._process.wait()
            raise

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def beats(self) -> int:
        """How often its event loop has come round; stands still while it is stopped or stuck."""
        return self._word.value

    def end(self, seconds: float = 0.0) -> int:
        """Waits for its end, kills it after `seconds`, and lets go of everything that belongs to it; once.

        Returns:
            Its exit status, in the manner of `subprocess`.
        """
        if self._ended:
            return self._process.returncode
        self._ended = True
        ended = select.poll()
        ended.register(self.exit_descriptor, select.POLLIN)
        try:
            if not ended.poll(seconds * 1000):
                # SIGKILL, as a stopped process handles nothing else and a courier holds nothing that is worth saving.
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self.exit_descriptor, signal.SIGKILL)
            self._process.wait()
        finally:
            self.channel.close()
            os.close(self.exit_descriptor)
            self._word.close()
        return self._process.returncode
