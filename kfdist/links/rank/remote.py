"""The link to owners elsewhere: what a rank sees of its courier. Imports neither gRPC, nor Ray, nor torch."""

import contextlib
import os
import select
import threading
import uuid
import weakref
from collections.abc import Sequence
from functools import cache

from typing_extensions import override

from kfdist.links.link import AbstractLink, LinkContext, LinkCounters
from kfdist.links.rank.pump import Call, Mailbox, Pump, RemoteOptions
from kfdist.links.socket_messages import CourierSetup
from kfdist.system.credentials import Credentials
from kfdist.telemetry.tracing import check_traceable
from kfdist.types import InForce, Job, JobResult, MetricSample, RunSettings

__all__ = ["RemoteLink", "RemoteOptions"]


@cache
def _word_of(process: int) -> str:
    """Draws a random word of this process, given its id: one that is forked from it draws another."""
    del process
    return uuid.uuid4().hex


class RemoteLink(AbstractLink):
    """Carries jobs through a courier, a process started here, and started again when it dies or falls silent.

    A controller that is away (never there, or restarted) surfaces nowhere but in `counters().samples_dropped`, which
    the summary and, once it is back, the metrics show as samples lost.
    A process forked from the rank (a data loader's) may hold a copy of the link; there, every call does nothing.
    """

    def __init__(
        self, address: str, credentials: Credentials | None = None, *, options: RemoteOptions | None = None
    ) -> None:
        """Makes a link that isn't started yet.

        Args:
            address: Where the controller listens, "host:port".
            credentials: What the courier shows to it and to owners; None where they demand nothing.
            options: How the courier is treated.
        """
        self._address = address
        self._credentials = credentials
        self._options = options or RemoteOptions()
        self._pid = os.getpid()
        self._mailbox: Mailbox | None = None
        self._pump: Pump | None = None
        self._end: weakref.finalize[..., RemoteLink] | None = None
        self._open: set[tuple[str, int]] = set()

    @override
    def start(self, context: LinkContext) -> None:
        """Starts the courier.

        Raises:
            ConfigError: Traces are asked for, and can't be made.
            EnvironmentFault: No process can be started.
            RuntimeError: The link was started before.
        """
        if self._mailbox is not None:
            raise RuntimeError("the link was started before; make another one")
        check_traceable()
        self._pid = os.getpid()
        mailbox = Mailbox.open()
        setup = CourierSetup(
            address=self._address,
            rank_pid=self._pid,
            process=_word_of(self._pid),
            context=context,
            credentials=self._credentials,
        )
        try:
            self._pump = Pump(mailbox, setup, self._options)
        except BaseException:
            mailbox.close()
            raise
        self._mailbox = mailbox
        thread = threading.Thread(target=self._pump.run, name="kfdist-link", daemon=True)
        # Also at the end of the interpreter, which would abort if it found the thread in the middle of a copy.
        self._end = weakref.finalize(self, _end, mailbox, thread, self._pid)
        thread.start()

    @property
    def courier_pid(self) -> int:
        """Process id of the courier in charge, for operators and for tests of its faults."""
        return self._running()[1].courier_pid

    @override
    def submit(self, job: Job) -> None:
        """Takes a job over.

        Raises:
            ValueError: A job of this group and version has no result yet.
            RuntimeError: The link isn't started, or closed.
        """
        mailbox, _ = self._running()
        name = (job.group, job.version)
        if name in self._open:
            raise ValueError(f"group {job.group!r} version {job.version} was submitted and has no result yet")
        self._open.add(name)
        self._tell(mailbox, job)

    @override
    def poll(self) -> list[JobResult]:
        """Returns the results that arrived and were verified since the last call.

        Raises:
            EnvironmentFault: No courier can be kept alive.
        """
        mailbox, pump = self._running()
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(mailbox.arrived)
        results = []
        while mailbox.results:
            result = mailbox.results.popleft()
            self._open.discard((result.group, result.version))
            results.append(result)
        if pump.fault is not None and not results:
            raise pump.fault
        return results

    @override
    def wait(self, seconds: float) -> None:
        """Blocks until `poll` may have something to return, at most `seconds`; signal handlers run meanwhile."""
        mailbox, pump = self._running()
        if mailbox.results or pump.fault is not None:
            return
        arrival = select.poll()
        arrival.register(mailbox.arrived, select.POLLIN)
        arrival.poll(max(seconds, 0.0) * 1000)

    @override
    def beat(self, step: int, phase: str, samples: Sequence[MetricSample]) -> None:
        mailbox, _ = self._running()
        self._tell(mailbox, (step, phase, tuple(samples)))

    @override
    def report(self, in_force: InForce) -> None:
        mailbox, _ = self._running()
        self._tell(mailbox, in_force)

    @override
    def settings(self) -> RunSettings:
        return self._pump.settings if self._pump is not None else RunSettings()

    @override
    def counters(self) -> LinkCounters:
        """Returns what was counted since the start; after `close`, the last values."""
        return self._pump.counters if self._pump is not None else LinkCounters()

    @override
    def close(self) -> None:
        """Lets the courier tell the controller the last beat, and ends it; safe to call twice, and after a Ctrl-C."""
        if self._end is not None and (found := self._end.peek()) is not None:
            _, end, arguments, _ = found
            end(*arguments)
            self._end.detach()

    def _running(self) -> tuple[Mailbox, Pump]:
        if self._mailbox is None or self._pump is None:
            raise RuntimeError("the link isn't started; call start() first")
        if self._mailbox.closed:
            raise RuntimeError("the link is closed; make another one")
        return self._mailbox, self._pump

    def _tell(self, mailbox: Mailbox, call: Call) -> None:
        if os.getpid() == self._pid:  # A forked process shares the eventfds, but not the thread that answers them.
            mailbox.inbox.append(call)
            os.eventfd_write(mailbox.wake, 1)


def _end(mailbox: Mailbox, thread: threading.Thread, pid: int) -> None:
    """Ends the background thread of process `pid`; does nothing in a process forked from it."""
    if os.getpid() != pid:
        return
    if thread.is_alive():
        mailbox.inbox.append(None)
        os.eventfd_write(mailbox.wake, 1)
        thread.join()
    mailbox.close()
