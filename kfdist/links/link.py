"""How a job reaches an inverter: what the local link and the remote link have in common."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kfdist.types import GroupSpec, InForce, Job, JobResult, MetricSample, RunSettings


@dataclass(frozen=True, kw_only=True)
class LinkContext:
    """What a link needs to know of its rank before it starts.

    Attributes:
        run: Name of the run.
        epoch: Start of the run, the same on all ranks.
        worker_rank: This rank, from 0.
        world_size: Number of ranks.
        groups: Every group of the run, in model order.
        fingerprint: What the numbers of this rank depend on.
        assignment: How groups are dealt to owners: "round_robin", "model_order" or "lpt".
        inversion_bytes: What the largest group's inversion takes, estimated.
        step: The step that the rank does first.
    """

    run: str
    epoch: int
    worker_rank: int
    world_size: int
    groups: Sequence[GroupSpec]
    fingerprint: str
    assignment: str = "round_robin"
    inversion_bytes: int = 0
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class LinkCounters:
    """What a link counted since its start; it only grows.

    Attributes:
        resubmissions: Jobs sent again after a fault, by reason ("owner_lost", "deadline", "crash", "courier_lost",
            "corrupt", "fingerprint", "refused", "stale_epoch", "too_large").
        courier_restarts: Couriers started again.
        bytes_sent: Payload bytes sent to owners, retries included.
        bytes_received: Payload bytes of results, retries included.
        samples_dropped: Samples lost because the controller or the courier took none for too long.
    """

    resubmissions: Mapping[str, int] = field(default_factory=dict)
    courier_restarts: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    samples_dropped: int = 0

    def __add__(self, more: "LinkCounters") -> "LinkCounters":
        return LinkCounters(
            resubmissions=dict(Counter(self.resubmissions) + Counter(more.resubmissions)),
            courier_restarts=self.courier_restarts + more.courier_restarts,
            bytes_sent=self.bytes_sent + more.bytes_sent,
            bytes_received=self.bytes_received + more.bytes_received,
            samples_dropped=self.samples_dropped + more.samples_dropped,
        )


class AbstractLink(ABC):
    """Carries jobs to an inverter and their results back. One per rank; all calls come from one thread.

    Only `wait` and `close` block. The link retries a job until it has a result: faults of owners and couriers never
    surface as results, and a result is a function of the job's payload. The payload is encoded and hashed in a thread
    of the link.
    """

    @abstractmethod
    def start(self, context: LinkContext) -> None:
        """Starts the link; called once, by every rank, before any job."""

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Takes a job over. The link keeps it until its result has been verified."""

    @abstractmethod
    def poll(self) -> list[JobResult]:
        """Returns the results that arrived and were verified since the last call."""

    @abstractmethod
    def wait(self, seconds: float) -> None:
        """Blocks until `poll` may have something to return, at most `seconds`."""

    @abstractmethod
    def beat(self, step: int, phase: str, samples: Sequence[MetricSample]) -> None:
        """Tells the controller where the rank is; while it is away, samples may be dropped and are counted."""

    @abstractmethod
    def report(self, in_force: InForce) -> None:
        """Tells the controller, with the next beat, what the run goes by; rank 0's link alone is told."""

    @abstractmethod
    def settings(self) -> RunSettings:
        """Returns the newest settings that the controller sent; the initial ones without a controller."""

    @abstractmethod
    def counters(self) -> LinkCounters:
        """Returns what was counted since the start."""

    @abstractmethod
    def close(self) -> None:
        """Ends everything the link started; safe to call twice."""
