"""Puts a pipeline together from a plan of blocks, the ranks' communicators and a link."""

import torch
from torch import nn

from kfdist.capture.hooks import Capture
from kfdist.comm.communicator_set import CommunicatorSet
from kfdist.comm.table import TableExchange
from kfdist.curvature.inverter import Coupling
from kfdist.links.link import AbstractLink
from kfdist.runtime.adopt.adopting import Adopting
from kfdist.runtime.adopt.agreement import Agreement
from kfdist.runtime.adopt.calibration import Calibration
from kfdist.runtime.adopt.exchange import SnapshotExchange
from kfdist.runtime.adopt.snapshots import SnapshotInstaller
from kfdist.runtime.apply.applications import Applying
from kfdist.runtime.counters import PipelineCounters
from kfdist.runtime.invert.job_book import JobBook
from kfdist.runtime.invert.shipping import Inverting
from kfdist.runtime.pipeline import Pipeline
from kfdist.runtime.plan.layers import device_of
from kfdist.runtime.plan.planner import BlockPlan
from kfdist.runtime.plan.timetable import Timetable
from kfdist.runtime.reduce.reducer import StatisticsReducer
from kfdist.runtime.settings import JobTerms, Settings
from kfdist.runtime.track import Track


def assemble(
    model: nn.Module,
    plan: BlockPlan,
    settings: Settings,
    terms: JobTerms,
    communicators: CommunicatorSet,
    link: AbstractLink,
    *,
    grad_scaler: torch.amp.GradScaler | None,
) -> Pipeline:
    """Makes one rank's pipeline; nothing communicates yet.

    Args:
        model: The bare model.
        plan: Its blocks and their methods.
        settings: What the pipeline is told.
        terms: What its jobs say beside their content.
        communicators: The ranks.
        link: Carries the jobs.
        grad_scaler: The scaler whose scale is in the output gradients, or None.
    """
    groups, rank = plan.groups, communicators.training.rank
    device = device_of(block for group in groups for block in group.blocks)
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
    capture = _capture(model, plan, settings, grad_scaler, rank)
    inverting = Inverting(tracks, settings, terms, book, rank, counters)
    return Pipeline(
        settings=settings,
        kinds={"link": type(link).__name__, "grad_scaler": "enabled" if capture.scaled else "None"},
        training=communicators.training,
        parameters=list(model.parameters()),
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


def _capture(
    model: nn.Module, plan: BlockPlan, settings: Settings, grad_scaler: torch.amp.GradScaler | None, rank: int
) -> Capture:
    def coupled(coupling: Coupling) -> list[list[str]]:
        alike = [group for group in plan.groups if group.inverter.coupling is coupling]
        return [[block.name for block in group.blocks] for group in alike]

    return Capture(
        model,
        {block.name: block for group in plan.groups for block in group.blocks},
        aliases=plan.aliases,
        sampling=settings.sampling,
        grad_scaler=grad_scaler,
        fisher=settings.fisher,
        chains=coupled(Coupling.CHAIN),
        coarse=coupled(Coupling.COARSE),
        rank=rank,
    )
