"""What a pipeline is made of, and what its steps report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from kfdist.capture.hooks import Capture
from kfdist.capture.requests import Sampling
from kfdist.comm.communicator_set import CommunicatorSet
from kfdist.comm.table import TableExchange
from kfdist.links.link import AbstractLink
from kfdist.policies.adoption import AdoptionLedger
from kfdist.policies.schedule import Schedule
from kfdist.policies.staleness import StalenessPolicy
from kfdist.runtime.adopt.agreement import Agreement
from kfdist.runtime.adopt.exchange import SnapshotExchange
from kfdist.runtime.adopt.snapshots import SnapshotStore
from kfdist.runtime.invert.job_book import JobBook
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.runtime.plan.timetable import Timetable
from kfdist.runtime.reduce.reducer import StatisticsReducer
from kfdist.types import RunSettings


@dataclass(frozen=True)
class FixedLag:
    """Adoption of version v by all ranks at step v + lag, waited for; `FixedLag(0)` is synchronous K-FAC.

    Nothing that depends on time changes a number: two runs with equal inputs are bitwise equal.

    Attributes:
        lag: Steps between an inversion's statistics and its adoption.
    """

    lag: int


@dataclass(frozen=True, kw_only=True)
class PipelineSettings:
    """The numbers of a pipeline; `kfdist.Preconditioner` documents and checks them.

    Attributes:
        damping: lambda of F + lambda I by step.
        ema_decay: Largest rho of the moving average.
        schedule: When groups are folded and inverted.
        kl_clip: kappa, or None.
        lag: Steps to adoption; None for asap.
        staleness: Bounds for asap.
        seed: The run's seed.
        run: The run's name.
        epoch: The start of the run.
        fingerprint: What this rank's numbers depend on.
        deadline_seconds: How long one inversion may run.
        digest_period: Steps between two comparisons of the ranks' parameters; 0 turns them off.
        fisher: Whose output gradients are measured.
        weight_sharing: How linear layers treat positions.
        sampling: How much of a batch is measured.
    """

    damping: Callable[[int], float]
    ema_decay: float
    schedule: Schedule
    kl_clip: float | None
    lag: int | None
    staleness: StalenessPolicy
    seed: int
    run: str
    epoch: int
    fingerprint: str
    deadline_seconds: float
    digest_period: int
    fisher: str
    weight_sharing: str
    sampling: Sampling


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step did; equal on all ranks but for the seconds.

    Attributes:
        step: The step, from 0.
        settings: What people want, as agreed.
        stop: Whether all ranks know that somebody asked to stop.
        adopted: (group, version) swapped in.
        waited_seconds: Spent in agreed waits.
        phase_seconds: Host seconds by phase.
    """

    step: int
    settings: RunSettings
    stop: bool
    adopted: tuple[tuple[str, int], ...]
    waited_seconds: float
    phase_seconds: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class PipelineParts:
    """The collaborators of a pipeline, made by `kfdist.Preconditioner`."""

    groups: Sequence[BlockGroup]
    parameters: Sequence[nn.Parameter]
    capture: Capture
    communicators: CommunicatorSet
    table: TableExchange
    ledger: AdoptionLedger
    agreement: Agreement
    book: JobBook
    exchange: SnapshotExchange
    snapshots: SnapshotStore
    link: AbstractLink
    timetable: Timetable
    reducer: StatisticsReducer
