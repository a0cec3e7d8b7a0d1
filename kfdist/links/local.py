"""The local link: this process inverts, in a thread, by the very function that owners run."""

import queue
import threading
import time
import weakref
from collections.abc import Sequence

from typing_extensions import override

from kfdist.curvature.jobs import run_job
from kfdist.errors import KfdistError
from kfdist.links.link import AbstractLink, LinkContext, LinkCounters
from kfdist.types import InForce, Job, JobResult, MetricSample, RunSettings


class _Work:
    """What the thread that trains and the one that inverts share."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[JobResult | BaseException] = queue.SimpleQueue()
        self.closing = threading.Event()

    def invert_forever(self, device: str) -> None:
        """Works off the jobs until it is told to end."""
        while (job := self.jobs.get()) is not None:
            if self.closing.is_set():
                return
            try:
                self.done.put(_invert(job, device))
            except Exception as error:  # surfaces in the rank's main thread, at poll
                self.done.put(error)
            del job  # with its matrices, which would stay until there is another

    def end(self, thread: threading.Thread) -> None:
        """Ends the thread after the job it is working on; those behind it are dropped."""
        self.closing.set()
        self.jobs.put(None)
        thread.join()


class LocalLink(AbstractLink):
    """Inverts in one background thread of the rank; needs no service. torch releases the GIL in its decompositions.

    The thread ends with `close`, with a link that is forgotten, and with the interpreter, which would abort if it found
    the thread in the middle of a decomposition.

    Args:
        device: Where to invert; statistics arrive on the CPU.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._work = _Work()
        self._arrived: list[JobResult | BaseException] = []
        self._thread: threading.Thread | None = None

    @override
    def start(self, context: LinkContext) -> None:
        del context
        work = self._work
        thread = threading.Thread(target=work.invert_forever, args=(self._device,), name="kfdist-inverter", daemon=True)
        weakref.finalize(self, work.end, thread)
        thread.start()
        self._thread = thread

    @override
    def submit(self, job: Job) -> None:
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
        """Ends the thread after the job it is working on; those behind it are dropped."""
        if self._thread is not None:
            self._work.end(self._thread)


def _invert(job: Job, device: str) -> JobResult:
    begun = time.perf_counter()
    payload = run_job(job.payload, device=device)
    seconds = time.perf_counter() - begun
    result = JobResult(group=job.group, version=job.version, payload=payload, seconds=seconds, owner="local")
    _ = result.digest  # computed here, so that the thread that trains finds it ready
    return result
