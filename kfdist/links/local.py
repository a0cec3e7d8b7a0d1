"""The local link: this process inverts, in a thread, by the very function that owners run."""

import queue
import threading
import time
from collections.abc import Sequence

from typing_extensions import override

from kfdist.curvature.jobs import run_job
from kfdist.errors import KfdistError
from kfdist.links.link import AbstractLink, LinkContext, LinkCounters
from kfdist.types import Job, JobResult, MetricSample, RunSettings


class LocalLink(AbstractLink):
    """Inverts in one background thread of the rank; needs no service. torch releases the GIL in its decompositions.

    Args:
        device: Where to invert; statistics arrive on the CPU.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[JobResult | BaseException] = queue.SimpleQueue()
        self._arrived: list[JobResult | BaseException] = []
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    @override
    def start(self, context: LinkContext) -> None:
        del context
        self._thread = threading.Thread(target=self._invert_forever, name="kfdist-inverter", daemon=True)
        self._thread.start()

    def _invert_forever(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._closing.is_set():
                return
            try:
                self._done.put(self._invert(job))
            except Exception as error:  # surfaces in the rank's main thread, at poll
                self._done.put(error)

    def _invert(self, job: Job) -> JobResult:
        encoded = job.payload
        begun = time.perf_counter()
        payload = run_job(encoded, device=self._device)
        seconds = time.perf_counter() - begun
        result = JobResult(group=job.group, version=job.version, payload=payload, seconds=seconds, owner="local")
        _ = result.digest  # computed here, so that the thread that trains finds it ready
        return result

    @override
    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    @override
    def poll(self) -> list[JobResult]:
        """Returns the finished inversions.

        Raises:
            KfdistError: An inversion raised; bad statistics never do (they give a failed result), so this is a defect.
        """
        finished, self._arrived = self._arrived, []
        while True:
            try:
                finished.append(self._done.get_nowait())
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
            self._arrived.append(self._done.get(timeout=seconds))
        except queue.Empty:
            return

    @override
    def beat(self, step: int, phase: str, samples: Sequence[MetricSample]) -> None:
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
            self._closing.set()
            self._jobs.put(None)
            self._thread.join(timeout=60)
            self._thread = None
