"""The rank's background thread: it moves jobs to the courier and verified results back, and keeps a courier alive.

The thread that trains only appends to queues; writing jobs down, hashing, copying and waiting happen here.
"""

import logging
import os
import selectors
import signal
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from kfdist.errors import EnvironmentFault
from kfdist.links import socket_messages
from kfdist.links.link import LinkCounters
from kfdist.links.own_threads import set_own_threads
from kfdist.links.rank.courier_process import COURIER_MODULE, CourierProcess
from kfdist.links.rank.handover import Handover
from kfdist.links.shared_memory import read_private
from kfdist.links.socket_messages import (
    Beat,
    Bye,
    Counted,
    CourierSetup,
    Done,
    Fenced,
    Hello,
    Message,
    NewSettings,
    Report,
    Taken,
)
from kfdist.system.memory import FreeMemory
from kfdist.telemetry.tracing import traced
from kfdist.types import Desired, InForce, Job, JobResult, MetricSample, RunSettings

_LOG = logging.getLogger(__name__)

_TICK_SECONDS = 0.25

Call = Job | tuple[int, str, Sequence[MetricSample]] | InForce | None
"""What the thread that trains asks for: a job, a (step, phase, samples) or a report to tell, or None for the end."""


@dataclass(kw_only=True)
class Mailbox:
    """What the thread that trains and the background thread share: calls one way, results the other.

    Appending to a deque is atomic, so no lock is needed. A lock would do harm: a signal handler that raises (Ctrl-C)
    may interrupt the thread that holds it.

    Attributes:
        inbox: Calls, in order.
        results: Verified results.
        wake: An eventfd that wakes the background thread.
        arrived: An eventfd that is readable while results (or a fault) may be there.
        closed: Whether the eventfds were given back.
    """

    wake: int
    arrived: int
    inbox: deque[Call] = field(default_factory=deque)
    results: deque[JobResult] = field(default_factory=deque)
    closed: bool = False

    @classmethod
    def open(cls) -> Self:
        """Makes an empty one with its eventfds."""
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        return cls(wake=os.eventfd(0, flags), arrived=os.eventfd(0, flags))

    def close(self) -> None:
        """Gives the eventfds back; called when the background thread has ended; safe to call twice."""
        if not self.closed:
            self.closed = True
            os.close(self.wake)
            os.close(self.arrived)


@dataclass(frozen=True, kw_only=True)
class RemoteOptions:
    """How a link treats its courier.

    Attributes:
        window: Jobs handed to the courier at a time; bounds shared memory and open files.
        silent_seconds: A courier whose event loop has stood still for this long is replaced.
        start_seconds: The same before it has greeted: it imports gRPC first.
        failed_starts: After this many couriers in a row that ended before they greeted, the link gives up.
        close_seconds: How long `close` waits for the courier to tell the controller that the rank has ended.
        stop_seconds: The same for a rank that was asked to stop: whoever asked waits for its end, and may kill it.
        queued_samples: Samples kept while the courier doesn't take them; newer ones are dropped and counted.
        courier_module: What to run as the courier; another one wraps `kfdist.links.courier`.
    """

    window: int = 16
    silent_seconds: float = 5.0
    start_seconds: float = 60.0
    failed_starts: int = 5
    close_seconds: float = 10.0
    stop_seconds: float = 1.5
    queued_samples: int = 20_000
    courier_module: str = COURIER_MODULE


class Pump:
    """Everything the background thread holds; only `run` is called in it, and the attributes below are read elsewhere.

    Attributes:
        settings: What the controller last said.
        counters: What was counted.
        fault: Why the pump ended before it was told to; None while it runs.
    """

    def __init__(self, mailbox: Mailbox, setup: CourierSetup, options: RemoteOptions) -> None:
        """Starts the first courier, so that a machine that can't start one says so at once.

        Raises:
            EnvironmentFault: No courier can be started.
        """
        self.settings = RunSettings()
        self.counters = LinkCounters()
        self.fault: Exception | None = None
        self._mailbox = mailbox
        self._setup = setup
        self._options = options
        # A copy: the thread that trains may change its own environment while a courier is respawned.
        self._environment = dict(os.environ)
        self._handover = Handover()
        self._free_memory = FreeMemory()
        self._traced = traced()
        self._outbox: deque[tuple[bytes, int]] = deque()
        self._queued_samples = 0
        self._beat: Beat | None = None
        self._report: Report | None = None
        self._selector = selectors.DefaultSelector()
        self._failed_starts = 0
        self._ending = False
        self._fenced = False
        self._courier = self._start_courier()

    @property
    def courier_pid(self) -> int:
        """Process id of the courier in charge."""
        return self._courier.pid

    def run(self) -> None:
        """The thread's body: carries until the inbox says None, then ends the courier."""
        # Signals belong to the thread that trains; taken here, they would not wake it from its waits.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            set_own_threads(1)  # it copies and packs, which more threads do no sooner
            self._selector.register(self._mailbox.wake, selectors.EVENT_READ)
            while not self._ending:
                self._turn()
            self._say_goodbye()
        except Exception as error:
            self.fault = error
        finally:
            self._courier.end()
            self._handover.close()
            self._selector.close()
            os.eventfd_write(self._mailbox.arrived, 1)

    def _turn(self) -> None:
        ready = {key.fd for key, _ in self._selector.select(_TICK_SECONDS)}
        if self._mailbox.wake in ready:
            os.eventfd_read(self._mailbox.wake)
        self._take_calls()
        # What the courier said before it ended still counts, so the socket is emptied first.
        lost = "" if self._receive() else "closed its socket"
        if self._courier.exit_descriptor in ready:
            lost = "ended"
        elif not lost and time.monotonic() >= self._next_tick:
            lost = self._check_heartbeat()
        if lost:
            self._replace_courier(lost)
        self._send()

    # --- what the thread that trains asks for

    def _take_calls(self) -> None:
        while self._mailbox.inbox:
            match self._mailbox.inbox.popleft():
                case None:
                    self._ending = True
                case Job() as job:
                    self._handover.add(job)
                case (step, phase, samples):
                    self._post_beats(step, phase, samples)
                case InForce() as in_force:
                    self._post_report(in_force)

    def _post_beats(self, step: int, phase: str, samples: Sequence[MetricSample]) -> None:
        self._beat = Beat(step=step, phase=phase)
        for beat in socket_messages.beats(step, phase, samples):
            if self._queued_samples + len(beat.samples) > self._options.queued_samples:
                self.counters += LinkCounters(samples_dropped=len(beat.samples))
                continue
            try:
                self._post(beat, samples=len(beat.samples))
            except ValueError:  # labels of many kilobytes
                self.counters += LinkCounters(samples_dropped=len(beat.samples))

    def _post_report(self, in_force: InForce) -> None:
        report = Report(in_force=in_force)
        try:
            self._post(report)
            self._report = report
        except ValueError as error:  # users miss it, and the run goes on
            _LOG.warning("the controller isn't told what the run goes by: %s", error)

    def _post(self, message: Message, *, samples: int = 0) -> None:
        self._outbox.append((socket_messages.encode(message), samples))
        self._queued_samples += samples

    def _say_goodbye(self) -> None:
        """Gives the courier time to tell the controller the last beat."""
        stopped = self._beat is not None and self._beat.phase == "stopped"
        seconds = self._options.stop_seconds if stopped else self._options.close_seconds
        deadline = time.monotonic() + seconds
        self._post(Bye())
        self._courier.channel.settimeout(seconds)
        try:
            while self._outbox:
                socket_messages.send(self._courier.channel, self._outbox.popleft()[0])
        except (TimeoutError, ConnectionError):
            return  # It is stopped or gone.
        self._courier.end(max(0.0, deadline - time.monotonic()))

    # --- the courier's socket

    def _send(self) -> None:
        """Sends what fits into the socket: beats first, as they are small, then jobs."""
        events = selectors.EVENT_READ
        try:
            while self._outbox:
                data, samples = self._outbox[0]
                socket_messages.send(self._courier.channel, data)
                self._outbox.popleft()
                self._queued_samples -= samples
            while self._handover.handed_over < self._options.window and (entry := self._handover.next_waiting()):
                submit, descriptors = self._handover.prepare(entry)
                socket_messages.send(self._courier.channel, socket_messages.encode(submit), descriptors)
                self._handover.hand_over(entry)
        except BlockingIOError:
            events |= selectors.EVENT_WRITE
        except ConnectionError:
            pass  # It is gone, and the next turn replaces it.
        self._selector.modify(self._courier.channel, events)

    def _receive(self) -> bool:
        """Handles what the courier said; returns False when it has closed its end."""
        while True:
            try:
                received = socket_messages.receive(self._courier.channel)
            except BlockingIOError:
                return True
            except ConnectionError:
                return False
            if received is None:
                return False
            self._handle(received[0])

    def _handle(self, message: Message) -> None:
        match message:
            case Hello():
                self._courier.greeted = True
                self._failed_starts = 0
            case Done():
                self._finish(message)
            case NewSettings(settings=settings):
                if settings.revision > self.settings.revision and not self._fenced:
                    self.settings = settings
            case Fenced():
                self._stop_run()
            case Counted(counters=counters):
                self.counters += counters
            case _:
                raise AssertionError(f"only ranks say {message!r}")

    def _finish(self, done: Done) -> None:
        """Announces a result once it lies in private memory and has its digest; else the job goes out again."""
        entry = self._handover.handed(done.ticket)
        if entry is None or entry.output is None:
            return
        try:
            payload = read_private(entry.output, done.payload_bytes)
        except ValueError:
            payload = b""  # which has another digest than any result
        result = JobResult(
            group=entry.job.group, version=entry.job.version, payload=payload, seconds=done.seconds, owner=done.owner
        )
        intact = result.digest == done.digest
        if self._traced:
            self._post(Taken(ticket=done.ticket, intact=intact, at_ns=time.time_ns()))
        if not intact:
            self._handover.requeue(entry)
            self.counters += LinkCounters(resubmissions={"corrupt": 1})
            return
        self._handover.finish(entry)
        self._free_memory.passed(entry.job.content.size + len(payload))
        self._mailbox.results.append(result)
        os.eventfd_write(self._mailbox.arrived, 1)

    def _stop_run(self) -> None:
        """Turns fencing into a request to stop, the one channel that reaches all ranks at the same step."""
        if not self._fenced:
            self._fenced = True
            self.settings = replace(self.settings, revision=self.settings.revision + 1, desired=Desired.STOPPED)

    # --- the courier's life

    def _start_courier(self) -> CourierProcess:
        courier = CourierProcess(self._setup, self._environment, self._options.courier_module)
        self._selector.register(courier.channel, selectors.EVENT_READ)
        self._selector.register(courier.exit_descriptor, selectors.EVENT_READ)
        self._last_beats, self._silent_ticks, self._next_tick = 0, 0, time.monotonic() + _TICK_SECONDS
        return courier

    def _check_heartbeat(self) -> str:
        """Says what is wrong with the courier, if anything.

        Silence is counted in our own ticks, not in time: after a pause of this process (SIGSTOP, a suspended machine)
        the courier has had as little chance to beat as we had to look.
        """
        self._next_tick = time.monotonic() + _TICK_SECONDS
        beats = self._courier.beats
        self._silent_ticks = 0 if beats != self._last_beats else self._silent_ticks + 1
        self._last_beats = beats
        limit = self._options.silent_seconds if self._courier.greeted else self._options.start_seconds
        silent_seconds = self._silent_ticks * _TICK_SECONDS
        return f"was silent for {silent_seconds:.0f} s" if silent_seconds >= limit else ""

    def _replace_courier(self, reason: str) -> None:
        lost, self._failed_starts = self._courier, self._failed_starts + 1
        self._selector.unregister(lost.channel)
        self._selector.unregister(lost.exit_descriptor)
        status = lost.end()
        requeued = self._handover.requeue_all()
        self.counters += LinkCounters(courier_restarts=1, resubmissions={"courier_lost": requeued})
        _LOG.warning(
            "courier %d of rank %d %s (exit status %d); starting another, %d jobs go out again",
            lost.pid,
            self._setup.context.worker_rank,
            reason,
            status,
            requeued,
        )
        if self._failed_starts >= self._options.failed_starts:
            raise EnvironmentFault(
                f"{self._failed_starts} couriers in a row ended before they had started (the last with exit status "
                f"{status}); what they said is on standard error above"
            )
        if not lost.greeted:
            time.sleep(0.05 * 2**self._failed_starts)
        self._courier = self._start_courier()
        # What the last one was told, before what it wasn't: a run that is paused tells nothing else for long.
        for message in (self._report, self._beat):
            if message is not None:
                self._outbox.appendleft((socket_messages.encode(message), 0))
