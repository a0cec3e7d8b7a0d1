"""The local link: this process inverts, in a thread, by the very function that owners run."""

import os
import queue
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from typing_extensions import override

from kfdist.curvature.jobs import job_threads, run_job
from kfdist.errors import KfdistError
from kfdist.links.link import AbstractLink, LinkContext, LinkCounters
from kfdist.links.own_threads import set_own_threads
from kfdist.system.memory import available_memory
from kfdist.system.seat import ranks_here
from kfdist.types import InForce, Job, JobResult, MetricSample, RunSettings

_MOST_AT_ONCE = 4
"""Inversions at once while the thread that trains waits."""

_SMALL = 1 << 26
"""Bytes that are there if a step of training is."""


class _Work:
    """What the thread that trains and those that invert share."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[JobResult | BaseException] = queue.SimpleQueue()
        self.closing = threading.Event()
        self.threads: list[threading.Thread] = []
        self.largest = 0
        self.alone = False

    def fitting(self) -> int:
        """Returns how many of the largest inversions the free memory is enough for.

        Plans were checked for one at a time (`kfdist.runtime.plan.capacity`). For small ones the system isn't asked:
        that takes milliseconds.
        """
        if self.largest * _MOST_AT_ONCE < _SMALL:
            return _MOST_AT_ONCE
        return available_memory().bytes // max(1, self.largest)

    def working(self) -> set[threading.Thread]:
        """Returns the threads that go on."""
        return {each for each in self.threads if each.is_alive()}

    def start(self, device: str, *, stays: bool) -> None:
        """Starts a thread that works off the jobs.

        Args:
            device: Where.
            stays: Whether it goes on until it is told to end; else while jobs wait and memory is free for one more.
        """
        thread = threading.Thread(target=self._invert, args=(device, stays), name="kfdist-inverter", daemon=True)
        thread.start()
        self.threads = [each for each in self.threads if each.is_alive()] + [thread]

    def _invert(self, device: str, stays: bool) -> None:
        try:
            with _apart(device):
                self._work_off(device, stays)
        except Exception as error:  # a device that can't be used; surfaces as what an inversion raises does
            self.done.put(error)

    def _work_off(self, device: str, stays: bool) -> None:
        while not self.closing.is_set():
            if not stays and self.fitting() < len(self.working() | {threading.current_thread()}):
                return
            try:
                job = self.jobs.get(block=stays)
            except queue.Empty:
                return
            if job is None or self.closing.is_set():
                return
            try:
                result = _invert(job, device)
                if not self.alone:
                    _ = result.digest  # computed here, so that the thread that trains finds it ready
                self.done.put(result)
            except Exception as error:  # surfaces in the rank's main thread, at poll
                self.done.put(error)
            del job  # with its matrices, which would stay until there is another

    def end(self) -> None:
        """Ends the threads after the jobs they are working on; those behind them are dropped."""
        self.closing.set()
        for _ in self.threads:  # whoever takes one ends, and one of them may wait for it
            self.jobs.put(None)
        for thread in self.threads:
            thread.join()


class LocalLink(AbstractLink):
    """Inverts in a background thread of the rank; needs no service. torch releases the GIL in its decompositions.

    Under `asap`, where the rank trains on the CPU, a job is inverted by one thread of torch: with more, every operation
    of the training would wait for its own (`set_own_threads`). With a lag a job has as many as the rank, because that
    decides its last bits, which must be an owner's.

    While the thread that trains waits for results, as it does for the first version of a model, its core and all that
    idle beside it help: further threads take jobs, each job by one thread, while memory is free for one more, and end
    when none is left. So the wait is as short after a stop as without them, and a result is what one thread would give.

    The threads end with `close`, with a link that is forgotten, and with the interpreter, which would abort if it found
    one in the middle of a decomposition.

    Args:
        device: Where to invert; statistics arrive on the CPU. "cuda" is the device that is current in the thread that
            starts the link. There an inversion's products round to TF32 while this process sums statistics, as torch
            has one setting for both: where bits matter, have the CPU or an owner invert.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._work = _Work()
        self._arrived: list[JobResult | BaseException] = []
        self._threads_a_job = 1

    @override
    def start(self, context: LinkContext) -> None:
        self._device = _of_this_thread(self._device)
        self._work.largest = context.inversion_bytes
        self._work.alone = context.world_size == 1
        weakref.finalize(self, self._work.end)
        self._work.start(self._device, stays=True)

    @override
    def submit(self, job: Job) -> None:
        self._threads_a_job = torch.get_num_threads() if _has_the_ranks_threads(job) else 1
        self._work.jobs.put(job)

    @override
    def poll(self) -> list[JobResult]:
        """Returns the finished inversions.

        Raises:
            KfdistError: An inversion raised; bad statistics never do (they give a failed result), so this is a defect.
        """
        finished, self._arrived = self._arrived, []
        while True:
            try:
                finished.append(self._work.done.get_nowait())
            except queue.Empty:
                break
        for each in finished:
            if isinstance(each, BaseException):
                raise KfdistError(f"the inversion thread failed: {each}") from each
        return [each for each in finished if isinstance(each, JobResult)]

    @override
    def wait(self, seconds: float) -> None:
        if self._arrived:
            return
        self._have_help()
        try:
            self._arrived.append(self._work.done.get(timeout=seconds))
        except queue.Empty:
            return

    @override
    def beat(self, step: int, phase: str, samples: Sequence[MetricSample]) -> None:
        """Does nothing: there is no controller."""

    @override
    def report(self, in_force: InForce) -> None:
        """Does nothing: there is no controller."""

    @override
    def settings(self) -> RunSettings:
        return RunSettings()

    @override
    def counters(self) -> LinkCounters:
        return LinkCounters()

    @override
    def close(self) -> None:
        """Ends the threads after the jobs they are working on; those behind them are dropped."""
        self._work.end()

    def _have_help(self) -> None:
        """Has the cores that idle while this thread waits take jobs, too."""
        work = self._work
        if work.jobs.empty() or self._device != "cpu":
            return
        working = work.working()
        cores = os.sched_getaffinity(0).union(*(_cores_of(each) for each in working))
        room = min(_MOST_AT_ONCE, len(cores) // ranks_here() // self._threads_a_job)
        if room > len(working):
            room = min(room, work.fitting())
        for _ in range(min(work.jobs.qsize(), room - len(working))):
            work.start(self._device, stays=False)


def _of_this_thread(device: str) -> str:
    """Returns a device with the number that it has in this thread: in a new one the current device is the first one."""
    named = torch.device(device)
    if named.type != "cuda" or named.index is not None:
        return device
    return f"cuda:{torch.cuda.current_device()}"


@contextmanager
def _apart(device: str) -> Iterator[None]:
    """Has what this thread does on a GPU go beside what others enqueue there.

    A new thread enqueues on the default stream, where training is, too: steps would stand behind inversions. Nothing
    else orders the two, and nothing has to: a job comes as bytes, and its result is bytes once it is there.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        yield


def _cores_of(thread: threading.Thread) -> set[int]:
    """Returns the cores that a thread may run on; none if it has ended."""
    try:
        return os.sched_getaffinity(thread.native_id or 0)
    except ProcessLookupError:
        return set()


def _has_the_ranks_threads(job: Job) -> bool:
    """Says whether a job is inverted with as many threads of torch as the rank trains with.

    It is where a fixed lag names who may invert it, to the bit, and where the process trains on a GPU: its cores idle,
    and no small operation on them waits for an inversion.
    """
    return bool(job.fingerprint) or torch.cuda.is_initialized()


def _invert(job: Job, device: str) -> JobResult:
    set_own_threads(job_threads(job.payload) if _has_the_ranks_threads(job) else 1)
    begun = time.perf_counter()
    payload = run_job(job.payload, device=device)
    seconds = time.perf_counter() - begun
    return JobResult(group=job.group, version=job.version, payload=payload, seconds=seconds, owner="local")
