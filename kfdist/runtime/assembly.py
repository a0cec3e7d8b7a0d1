"""Puts together what carries out a plan: the ranks' communicators, a link, and a pipeline between them."""

import time
import warnings
from contextlib import suppress
from dataclasses import dataclass

import torch

from kfdist.capture.capture import Capture
from kfdist.comm.background import TableExchange
from kfdist.comm.communicator import Communicator
from kfdist.comm.communicator_set import CommunicatorSet, make_communicators
from kfdist.comm.together import on_every_rank, require_equal
from kfdist.curvature.inverter import Coupling
from kfdist.curvature.jobs import fingerprint
from kfdist.errors import EnvironmentFault, KfdistWarning, RankFailed
from kfdist.links.link import AbstractLink, LinkContext
from kfdist.policies.staleness import Asap
from kfdist.runtime.adopt.adopting import Adopting
from kfdist.runtime.adopt.agreement import Agreement
from kfdist.runtime.adopt.calibration import Calibration
from kfdist.runtime.adopt.exchange import SnapshotExchange
from kfdist.runtime.adopt.snapshots import SnapshotInstaller
from kfdist.runtime.apply.applications import Applying
from kfdist.runtime.counters import PipelineCounters
from kfdist.runtime.in_force import SettingsInForce
from kfdist.runtime.invert.job_book import JobBook
from kfdist.runtime.invert.service import DEADLINE_SECONDS, Service, make_link
from kfdist.runtime.invert.shipping import Inverting
from kfdist.runtime.pipeline import Pipeline
from kfdist.runtime.plan.capacity import check_memory, largest_inversion, memory_of, wide_factors
from kfdist.runtime.plan.planner import Plan
from kfdist.runtime.plan.timetable import Timetable
from kfdist.runtime.reduce.noise_scale import NoiseScale
from kfdist.runtime.reduce.reducer import StatisticsReducer
from kfdist.runtime.settings import JobTerms
from kfdist.runtime.step_lengths import GraftRatios, StepLengths, parameters_of
from kfdist.runtime.track import Track
from kfdist.system.memory import Memory
from kfdist.system.provenance import versions

_NO_LAG = (
    "with a fixed lag, owners must compute what the ranks would, bit for bit; they invert on a GPU, and the ranks' "
    "nodes have none, or different ones"
)


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """One rank's part of what carries out a plan.

    Attributes:
        terms: What its jobs say beside their content.
        communicators: The ranks.
        link: Carries the jobs.
        pipeline: Does the steps.
    """

    terms: JobTerms
    communicators: CommunicatorSet
    link: AbstractLink
    pipeline: Pipeline

    def close(self) -> None:
        """Completes what is in flight, tells the controller that this rank has ended, and ends it all.

        All ranks must call it.
        """
        failed = True
        try:
            self.pipeline.close()
            self.communicators.close()
            failed = False
        finally:
            self.pipeline.agreement.tell_end(self.pipeline.next_step, failed=failed)
            self.link.close()

    def abandon(self, *, is_failure: bool) -> None:
        """Ends what is this rank's own, without any collective.

        Args:
            is_failure: Whether the controller is to hear that the run has failed.
        """
        if is_failure:
            with suppress(RuntimeError):  # the link may never have started
                self.link.beat(self.pipeline.next_step, "failed", ())
        self.pipeline.capture.close()
        self.link.close()


def assemble(
    plan: Plan,
    world: Communicator,
    link: Service | AbstractLink | None,
    grad_scaler: torch.amp.GradScaler | None,
) -> Assembly:
    """Makes one rank's part, and starts its link. Collective.

    Args:
        plan: What it carries out.
        world: The ranks.
        link: A service, or what carries the jobs; None: the rank itself.
        grad_scaler: The scaler whose scale is in the output gradients, or None.

    Raises:
        EnvironmentFault: The ranks differ in what their numbers depend on, or some rank's link could not start; then
            all ranks have undone what they made.
    """
    service = link if isinstance(link, Service) else None
    _check_memory(plan, world)
    terms = _agree_on_terms(plan, world, service)
    communicators = make_communicators(world)
    made = make_link(link)
    pipeline = _pipeline(plan, terms, communicators, made, grad_scaler)
    sent = [group for group in plan.groups if not group.own]
    context = LinkContext(
        run=terms.run,
        epoch=terms.epoch,
        worker_rank=world.rank,
        world_size=world.world_size,
        groups=[group.spec for group in sent],
        fingerprint=terms.fingerprint,
        assignment="round_robin" if service is None else service.assignment,
        inversion_bytes=largest_inversion(sent),
        step=0 if service is None else service.first_step,
    )
    assembly = Assembly(terms=terms, communicators=communicators, link=made, pipeline=pipeline)
    try:
        on_every_rank(world, lambda: made.start(context))
    except RankFailed as fault:
        assembly.abandon(is_failure=False)
        communicators.close()
        raise EnvironmentFault(f"the link to the inverters could not start ({fault})") from fault
    return assembly


def _check_memory(plan: Plan, world: Communicator) -> None:
    """Refuses, on all ranks alike, a plan that doesn't fit where there is the least memory; warns of wide factors.

    Collective.
    """
    if plan.groups:
        found = on_every_rank(world, lambda: list(memory_of(plan.device)))
        check_memory(plan.groups, plan.device, min(Memory(*each) for each in found))
        if world.rank == 0 and (said := wide_factors(plan.groups)):
            warnings.warn(said, KfdistWarning, stacklevel=5)


def _agree_on_terms(plan: Plan, world: Communicator, service: Service | None) -> JobTerms:
    """Returns what all jobs of this start say, the same on all ranks. Collective.

    Statistics reach the inverters in host memory, and the local link inverts there, whatever the ranks train on. Owners
    do too unless they are said to have a GPU.
    """
    owners_device = "cpu" if service is None else service.device
    try:
        told = on_every_rank(
            world, lambda: [plan.settings.lag is not None, _fingerprint_of_inverters(plan, owners_device)]
        )
    except RankFailed as fault:
        raise EnvironmentFault(str(fault)) from fault
    listed = [inverters for _, inverters in told]
    needed = {
        "kfdist": versions().get("kfdist"),
        "fingerprint": fingerprint(plan.device.type, torch.get_num_threads()),
    }
    if all(fixed_lag for fixed_lag, _ in told):  # ranks that were told different things hear that at the first step
        needed["inverters' fingerprint"] = listed[world.rank]
    require_equal(
        world,
        needed,
        lambda _, listed: EnvironmentFault(
            f"the ranks differ in what their numbers depend on ({listed}); use the same hardware, thread count "
            "(torch.set_num_threads) and library versions on all ranks"
        ),
    )
    # Without a run directory that counts the starts, the clock draws one: milliseconds since 1970.
    epoch = int(time.time() * 1000) if service is None or service.epoch is None else service.epoch
    return JobTerms(
        run="local" if service is None else service.run,
        epoch=int(world.broadcast_json(epoch)),
        fingerprint=listed[0] if len(set(listed)) == 1 else "",
        deadline_seconds=DEADLINE_SECONDS if service is None else service.deadline_seconds,
    )


def _fingerprint_of_inverters(plan: Plan, device: str) -> str:
    """Returns what the numbers of whoever inverts depend on; empty where nobody asks and this rank can't tell.

    Raises:
        EnvironmentFault: With a fixed lag, owners have a GPU and this rank none, so that it can't say which they need.
    """
    if device == "cpu" or torch.cuda.is_available():
        return fingerprint(device, torch.get_num_threads())
    if plan.settings.lag is None:
        return ""
    raise EnvironmentFault(
        "with a fixed lag, owners must compute what this rank would, bit for bit; they invert on a GPU, and torch "
        f"{torch.__version__} sees none here. Give the ranks the same GPU, let owners invert on CPUs "
        '(cluster.bundle.gpus = 0), or take adoption = "asap"'
    )


def _pipeline(
    plan: Plan,
    terms: JobTerms,
    communicators: CommunicatorSet,
    link: AbstractLink,
    grad_scaler: torch.amp.GradScaler | None,
) -> Pipeline:
    """Makes one rank's pipeline; nothing communicates yet."""
    settings, groups, device = plan.settings, plan.groups, plan.device
    rank = communicators.training.rank
    counters = PipelineCounters()
    tracks = [Track.of(group, queued=settings.lag is not None) for group in groups]
    told = parameters_of(groups if rank == 0 else ())
    world_size = communicators.training.world_size
    schedules = settings.schedules(len(groups), together=plan.together)
    timetable = Timetable(schedules, tracks, seed=settings.seed, rank=rank, world_size=world_size, settings=settings)
    book = JobBook(link, {track.group.name: track.jobs for track in tracks})
    in_force = SettingsInForce(settings, groups)
    if not terms.fingerprint:
        in_force.fixed.setdefault("lag", _NO_LAG)
    if rank == 0:
        _warn_of_soft_bound(in_force)
    agreement = Agreement(TableExchange(communicators.table), link, rank, in_force, [group.name for group in groups])
    wait_limit = settings.adoption.wait_limit_seconds
    exchange = SnapshotExchange(
        tracks, communicators.snapshots, book, agreement, counters, wait_limit_seconds=wait_limit
    )
    capture = make_capture(plan, grad_scaler, rank)
    inverting = Inverting({track.group.name: track for track in tracks}, in_force, terms, book, rank, counters)
    return Pipeline(
        settings=settings,
        in_force=in_force,
        kinds={
            "link": type(link).__name__,
            "grad_scaler": "enabled" if capture.scaled else "None",
            "model": "compiled" if plan.compiled else "eager",
        },
        training=communicators.training,
        parameters=list(plan.model.parameters()),
        tracks=tracks,
        timetable=timetable,
        capture=capture,
        agreement=agreement,
        reducer=StatisticsReducer(groups, settings, timetable, communicators.statistics, device),
        noise_scale=NoiseScale(list(plan.model.parameters()), communicators.statistics, device),
        inverting=inverting,
        adopting=Adopting(
            tracks, in_force, exchange, SnapshotInstaller(device, counters, warns=rank == 0), inverting, counters
        ),
        calibration=Calibration(tracks, in_force, timetable, communicators.statistics),
        applying=Applying(tracks, in_force, communicators.statistics, counters),
        counters=counters,
        lengths=StepLengths(told),
        grafts=GraftRatios(told),
    )


def _warn_of_soft_bound(in_force: SettingsInForce) -> None:
    """Warns of a bound that none of the methods can obey."""
    adoption, reason = in_force.settings.adoption, in_force.without_effect("soft_bound")
    if isinstance(adoption, Asap) and adoption.soft_bound is not None and reason:
        warnings.warn(
            f"soft_bound = {adoption.soft_bound} does nothing: {reason}; hard_bound has a run wait for newer inverses",
            KfdistWarning,
            stacklevel=6,
        )


def make_capture(plan: Plan, grad_scaler: torch.amp.GradScaler | None, rank: int) -> Capture:
    """Makes what measures a plan's blocks on one rank."""

    def coupled(coupling: Coupling) -> list[list[str]]:
        alike = [group for group in plan.groups if group.inverter.coupling is coupling]
        return [[block.name for block in group.blocks] for group in alike]

    return Capture(
        plan.model,
        {block.name: block for group in plan.groups if not group.of_gradients for block in group.blocks},
        sampling=plan.settings.sampling,
        grad_scaler=grad_scaler,
        fisher=plan.settings.fisher,
        chains=coupled(Coupling.CHAIN),
        coarse=coupled(Coupling.COARSE),
        rank=rank,
    )
