"""Puts a pipeline together from a plan, the ranks' communicators and a link."""

import torch

from kfdist.capture.hooks import Capture
from kfdist.comm.background import TableExchange
from kfdist.comm.communicator import Communicator
from kfdist.comm.communicator_set import CommunicatorSet
from kfdist.comm.together import require_equal
from kfdist.curvature.inverter import Coupling
from kfdist.curvature.jobs import fingerprint
from kfdist.errors import EnvironmentFault
from kfdist.links.link import AbstractLink
from kfdist.runtime.adopt.adopting import Adopting
from kfdist.runtime.adopt.agreement import Agreement
from kfdist.runtime.adopt.calibration import Calibration
from kfdist.runtime.adopt.exchange import SnapshotExchange
from kfdist.runtime.adopt.snapshots import SnapshotInstaller
from kfdist.runtime.apply.applications import Applying
from kfdist.runtime.counters import PipelineCounters
from kfdist.runtime.invert.job_book import JobBook
from kfdist.runtime.invert.service import DEADLINE_SECONDS, Service, epoch_from_clock
from kfdist.runtime.invert.shipping import Inverting
from kfdist.runtime.pipeline import Pipeline
from kfdist.runtime.plan.planner import Plan
from kfdist.runtime.plan.timetable import Timetable
from kfdist.runtime.reduce.reducer import StatisticsReducer
from kfdist.runtime.settings import JobTerms
from kfdist.runtime.track import Track


def agree_on_terms(plan: Plan, world: Communicator, service: Service | None) -> JobTerms:
    """Returns what all jobs of this start say, the same on all ranks. Collective.

    Statistics reach the inverters in host memory, and both the local link and the owners invert there, whatever the
    ranks train on: whoever inverts needs the fingerprint of a CPU.

    Raises:
        EnvironmentFault: The ranks differ in what their numbers depend on.
    """
    require_equal(
        world,
        {"fingerprint": fingerprint(plan.device.type, torch.get_num_threads())},
        lambda _, listed: EnvironmentFault(
            f"the ranks differ in what their numbers depend on ({listed}); use the same hardware, thread count "
            "(torch.set_num_threads) and library versions on all ranks"
        ),
    )
    epoch = epoch_from_clock() if service is None or service.epoch is None else service.epoch
    return JobTerms(
        run="local" if service is None else service.run,
        epoch=int(world.broadcast_json(epoch)),
        fingerprint=fingerprint("cpu", torch.get_num_threads()),
        deadline_seconds=DEADLINE_SECONDS if service is None else service.deadline_seconds,
    )


def assemble(
    plan: Plan,
    terms: JobTerms,
    communicators: CommunicatorSet,
    link: AbstractLink,
    grad_scaler: torch.amp.GradScaler | None,
) -> Pipeline:
    """Makes one rank's pipeline; nothing communicates yet.

    Args:
        plan: What it carries out.
        terms: What its jobs say beside their content.
        communicators: The ranks.
        link: Carries the jobs.
        grad_scaler: The scaler whose scale is in the output gradients, or None.
    """
    settings, groups, device = plan.settings, plan.groups, plan.device
    rank = communicators.training.rank
    counters = PipelineCounters()
    tracks = [Track.of(group, queued=settings.lag is not None) for group in groups]
    world_size = communicators.training.world_size
    timetable = Timetable(settings.schedule(len(groups)), tracks, seed=settings.seed, rank=rank, world_size=world_size)
    book = JobBook(link, {track.group.name: track.jobs for track in tracks})
    agreement = Agreement(TableExchange(communicators.table), link, rank, settings.damping_at)
    wait_limit = settings.adoption.wait_limit_seconds
    exchange = SnapshotExchange(
        tracks, communicators.snapshots, book, agreement, counters, wait_limit_seconds=wait_limit
    )
    capture = _capture(plan, grad_scaler, rank)
    inverting = Inverting(tracks, settings, terms, book, rank, counters)
    return Pipeline(
        settings=settings,
        kinds={"link": type(link).__name__, "grad_scaler": "enabled" if capture.scaled else "None"},
        training=communicators.training,
        parameters=list(plan.model.parameters()),
        tracks=tracks,
        timetable=timetable,
        capture=capture,
        agreement=agreement,
        reducer=StatisticsReducer(groups, settings, timetable, communicators.statistics, device),
        inverting=inverting,
        adopting=Adopting(
            tracks, settings, exchange, SnapshotInstaller(device, counters, warns=rank == 0), inverting, counters
        ),
        calibration=Calibration(tracks, settings, timetable, communicators.statistics),
        applying=Applying(tracks, settings, agreement, communicators.statistics, counters),
        counters=counters,
    )


def _capture(plan: Plan, grad_scaler: torch.amp.GradScaler | None, rank: int) -> Capture:
    def coupled(coupling: Coupling) -> list[list[str]]:
        alike = [group for group in plan.groups if group.inverter.coupling is coupling]
        return [[block.name for block in group.blocks] for group in alike]

    return Capture(
        plan.model,
        {block.name: block for block in plan.blocks},
        aliases=plan.aliases,
        sampling=plan.settings.sampling,
        grad_scaler=grad_scaler,
        fisher=plan.settings.fisher,
        chains=coupled(Coupling.CHAIN),
        coarse=coupled(Coupling.COARSE),
        rank=rank,
    )
