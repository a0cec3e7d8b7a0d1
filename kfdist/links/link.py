"""How a job reaches an inverter: the interface that the local link and the courier's link share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from kfdist.types import GroupSpec, Job, JobResult, RunSettings, Sample


@dataclass(frozen=True, kw_only=True)
class LinkContext:
    """What a link has to know of its rank before it starts.

    Attributes:
        run: Name of the run.
        epoch: Start of the run, the same on all ranks.
        worker_rank: This rank, from 0.
        world_size: How many ranks train.
        groups: Every group of the run, in model order.
        fingerprint: What this rank's numbers depend on.
        assignment: How groups are dealt to owners: "round_robin", "model_order" or "lpt".
    """

    run: str
    epoch: int
    worker_rank: int
    world_size: int
    groups: Sequence[GroupSpec]
    fingerprint: str
    assignment: str = "round_robin"


@dataclass(frozen=True, kw_only=True)
class LinkCounters:
    """What a link counted since its start, all growing.

    Attributes:
        resubmissions: Jobs sent again after a fault, by reason ("owner_lost", "deadline", "crash", "courier_lost",
            "corrupt", "fingerprint", "refused", "stale_epoch", "too_large").
        courier_restarts: Couriers respawned.
        bytes_sent: Payload bytes handed to owners.
        bytes_received: Payload bytes that came back.
        samples_dropped: Samples that never reached the controller, because it was away for too long.
    """

    resubmissions: dict[str, int]
    courier_restarts: int
    bytes_sent: int
    bytes_received: int
    samples_dropped: int = 0


class AbstractLink(ABC):
    """Carries jobs to whoever inverts, and their results back. One per rank; all calls come from one thread.

    No call but `wait` and `close` blocks. A submitted job is retried by the link until it has a result: faults of
    owners and of the courier never surface as results; a result is a function of the job's payload.
    """

    @abstractmethod
    def start(self, context: LinkContext) -> None:
        """Begins to carry; called once, by every rank, before any job."""

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
    def beat(self, step: int, phase: str, samples: Sequence[Sample]) -> None:
        """Tells the controller where the rank stands; samples may be dropped, and the drop counted, when it is away."""

    @abstractmethod
    def settings(self) -> RunSettings:
        """Returns what the controller last said people want; the initial settings without a controller."""

    @abstractmethod
    def counters(self) -> LinkCounters:
        """Returns what was counted so far."""

    @abstractmethod
    def close(self) -> None:
        """Ends everything the link started; safe to call twice."""
