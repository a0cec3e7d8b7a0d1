"""Puts a pipeline together from a plan of blocks, the ranks' communicators and a link."""

import torch
from torch import nn

from kfdist.capture.hooks import Capture
from kfdist.comm.communicator_set import CommunicatorSet
from kfdist.comm.table import TableExchange
from kfdist.curvature.inverter import Coupling
from kfdist.links.link import AbstractLink
from kfdist.policies.adoption import AdoptionLedger
from kfdist.runtime.adopt.agreement import Agreement
from kfdist.runtime.adopt.exchange import SnapshotExchange
from kfdist.runtime.adopt.snapshots import SnapshotStore
from kfdist.runtime.invert.job_book import JobBook
from kfdist.runtime.pipeline import Pipeline
from kfdist.runtime.plan.layers import device_of
from kfdist.runtime.plan.planner import BlockPlan
from kfdist.runtime.plan.timetable import Timetable
from kfdist.runtime.reduce.example_rows import SampleExchange
from kfdist.runtime.reduce.reducer import StatisticsReducer, empty_sums
from kfdist.runtime.settings import JobTerms, PipelineParts, Settings


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
        settings: What it is told.
        terms: What its jobs say beside their content.
        communicators: The ranks.
        link: Carries the jobs.
        grad_scaler: The scaler whose scale is in the output gradients, or None.
    """
    groups, rank = plan.groups, communicators.training.rank
    device = device_of(block for group in groups for block in group.blocks)
    table = TableExchange(communicators.table)
    ledger = AdoptionLedger(len(groups))
    online = [group.name for group in groups if group.inverter.online]
    book = JobBook(link, queued=settings.lag is not None, online=online)
    agreement = Agreement(table, link, rank)
    snapshots = SnapshotStore(groups, device, speaks=rank == 0)
    pending: list[list[int]] = [[] for _ in groups]
    timetable = Timetable(
        settings.schedule(len(groups)),
        groups,
        world_size=communicators.training.world_size,
        # One version at a time: the next one when this one has come back.
        starves=lambda group: snapshots.starving(group.index) and not pending[group.index],
    )
    reducer = StatisticsReducer(
        communicators.statistics,
        timetable,
        SampleExchange(communicators.statistics, device),
        ema_decay=settings.ema_decay,
        seed=settings.seed,
        device=device,
    )
    wait_limit = settings.adoption.wait_limit_seconds
    parts = PipelineParts(
        groups=groups,
        parameters=list(model.parameters()),
        capture=_capture(model, plan, settings, grad_scaler, rank),
        communicators=communicators,
        table=table,
        ledger=ledger,
        agreement=agreement,
        book=book,
        exchange=SnapshotExchange(groups, communicators.snapshots, ledger, book, agreement, wait_limit),
        snapshots=snapshots,
        link=link,
        terms=terms,
        timetable=timetable,
        reducer=reducer,
    )
    return Pipeline(parts, settings, empty_sums(groups, device), pending)


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
