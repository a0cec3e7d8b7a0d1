"""The step of a second-order method over ranks: capture, reduce, invert, broadcast, adopt, precondition.

`Pipeline.step` is the algorithm; each verb is one method below it. Every decision that makes ranks communicate is a
function of the step and of agreed tables, so all ranks always enter the same collectives in the same order.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kfdist.comm.host_copy import LateTotal
from kfdist.curvature.averages import BatchStatistics, WeightedSums, decay_at
from kfdist.curvature.inverter import Placement
from kfdist.curvature.jobs import NO_STATISTICS, encode_job, failure_result
from kfdist.errors import ConfigError, RanksDiverged
from kfdist.linalg.digest import parameter_digest
from kfdist.policies.adoption import NO_VERSION, AgreedTable, decode_table, encode_table
from kfdist.policies.staleness import Decision
from kfdist.runtime.adopt.calibration import calibrate
from kfdist.runtime.adopt.start import agree_on_start
from kfdist.runtime.apply.directions import Application, RawRows, precondition_gradients, solve
from kfdist.runtime.counters import PipelineCounters
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.runtime.reduce.contributions import ReducedStatistics
from kfdist.runtime.reduce.reducer import OwnInversion
from kfdist.runtime.settings import PipelineParts, Settings, StepReport
from kfdist.seeds import block_seed, rank_seed
from kfdist.types import BlockName, Job, JobResult


@dataclass(frozen=True)
class _Unshipped:
    """Statistics on their way to the host, and what else their jobs will say."""

    reduced: ReducedStatistics
    damping: float
    previous: Mapping[str, Mapping[BlockName, Mapping[str, Tensor]]]


class Pipeline:
    """One rank's pipeline. All ranks call `step` once per training step, between backward and the optimizer's step.

    Attributes:
        next_step: The step that `step` will do next.
        statistics_step: The newest step whose statistics are folded; equals `next_step` after an interrupted step.
        sums: This rank's (S, w) by block.
        pending: Versions shipped and not yet adopted, per group, oldest first; the same on all ranks.
        counters: What happened so far.
        drops: How many batches were dropped as non-finite, for telemetry.
        uphill: How many directions were no descent directions and replaced, for telemetry.
        started: Whether a step was begun or a state loaded; from then on no state can be loaded.
        calibrating: Groups that the capture takes samples of for the snapshot in use, in the step that comes.
        own_inversions: What this rank has inverted for itself in this step, by group.
    """

    def __init__(
        self,
        parts: PipelineParts,
        settings: Settings,
        sums: dict[BlockName, WeightedSums],
        pending: list[list[int]],
    ) -> None:
        self.parts = parts
        self.settings = settings
        self.sums = sums
        self.next_step = 0
        self.statistics_step = -1
        self.pending = pending
        self.counters = PipelineCounters()
        self.drops, self.uphill = LateTotal(), LateTotal()
        self.started = False
        self.calibrating: frozenset[int] = frozenset()
        self.own_inversions: Mapping[int, OwnInversion] = {}
        self._unshipped: list[_Unshipped] = []
        self.arm()

    def step(
        self, *, step_is_finite: Tensor | None, learning_rate: Callable[[nn.Parameter], float] | None
    ) -> StepReport:
        """One step of the method; the order of the lines is the algorithm.

        Args:
            step_is_finite: Boolean scalar on the device, equal on all ranks; where false no statistics change. None:
                true.
            learning_rate: The learning rate of a parameter, for the KL clip; None leaves the gradients as they are.

        Raises:
            Interrupted: On all ranks, inside an agreed wait; the step is then not done.
            RanksDiverged: The ranks' parameters differ.
        """
        step, table = self.next_step, self._agreed_table()
        batches = self._capture(step, step_is_finite)
        reduced = self._reduce(step, batches, step_is_finite)
        self._invert(reduced)
        arrived = self._broadcast(step, table)
        adopted = self._adopt(step, arrived, batches, step_is_finite)
        self._precondition(step, batches, learning_rate)
        return self._finish(step, adopted)

    # The verbs -----------------------------------------------------------------------------------------------------

    def _agreed_table(self) -> AgreedTable | None:
        """Completes the table started one step ago and obeys what it says; there is none at a process's first step."""
        self.counters.phase_seconds.clear()
        self.parts.exchange.waited_seconds = 0.0
        self.started = True
        with self.counters.phase("table"):
            columns = self.parts.table.complete()
        if columns is None:
            agree_on_start(self)
            return None
        table = decode_table(columns, len(self.parts.groups))
        if table.digests_differ:
            raise RanksDiverged(
                f"the parameters differ between ranks before step {self.next_step}; the run stops. Likely causes: "
                "ranks that see different learning rates or clip gradients before reducing them, or faulty memory. "
                "Resume from the last checkpoint"
            )
        self.parts.agreement.obey(revision=table.revision, stop=table.stop)
        self.parts.agreement.wait_while_paused(self.next_step)
        return table

    def _capture(self, step: int, step_is_finite: Tensor | None) -> Mapping[BlockName, BatchStatistics]:
        """Takes what this step's batch says, and folds it into the local sums of the groups that are due."""
        with self.counters.phase("capture"):
            batches = self.parts.capture.drain()
            if self.statistics_step >= step:  # the step was interrupted after its folding, and is done again
                return batches
            for group in self.parts.groups:
                if not self.parts.timetable.folds(group, step):
                    continue
                rho = decay_at(self.parts.timetable.foldings_until(group, step), self.settings.ema_decay)
                for block in group.blocks:
                    self.sums[block.name].fold(batches.get(block.name), rho, step_is_finite)
        return batches

    def _reduce(
        self, step: int, batches: Mapping[BlockName, BatchStatistics], step_is_finite: Tensor | None
    ) -> ReducedStatistics | None:
        """Sums the statistics of the groups that are due over the ranks.

        This rank keeps what it ships; what every rank inverts for itself is inverted at once. If the step was
        interrupted and is done again, the former are under way, and only the latter are made anew.
        """
        again = self.statistics_step >= step
        due = [
            group
            for group in self.parts.groups
            if self.parts.timetable.updates(group, step) and not (again and group.inverter.placement is Placement.OWNER)
        ]
        with self.counters.phase("reduce"):
            reduction = self.parts.reducer.reduce(step, due, self.sums, batches, step_is_finite)
        for group in due:  # only now: a group that waits for a version doesn't starve, and the reduction asks that too
            if group.inverter.placement is Placement.OWNER:
                self.pending[group.index].append(step)
        self.counters.bytes["statistics"] += reduction.bytes
        if due:
            self.parts.snapshots.note_time(step)
        self.own_inversions = reduction.own
        self.statistics_step = step
        return reduction.shipped

    def _invert(self, reduced: ReducedStatistics | None) -> None:
        """Ships what has reached the host to the inverters, and takes in what they have finished."""
        with self.counters.phase("invert"):
            damping = self.damping(self.next_step)  # asked on all ranks, so that a bad value stops all of them alike
            if reduced is not None:
                # Kept as of now: how soon the copy reaches the host must not change what the job says.
                previous = {group.name: self.parts.snapshots[group.index].states for group in reduced.groups}
                self._unshipped.append(_Unshipped(reduced, damping, previous))
            while self._unshipped and self._unshipped[0].reduced.ready():
                self._ship(self._unshipped.pop(0))
            self._collect()

    def _broadcast(self, step: int, table: AgreedTable | None) -> dict[int, tuple[int, bytes]]:
        """Brings results to all ranks: waits for those due now, lets the others travel in the background.

        Returns:
            (version, payload) by group of what every rank is known to hold now; equal on all ranks.
        """
        exchange = self.parts.exchange
        with self.counters.phase("broadcast"):
            due = self._due_for_adoption(step)
            if due or self.settings.lag is not None:
                return self._await(step, due, exact=True)
            arrived = exchange.received_by_all(table) if table is not None else {}
            if table is not None:
                exchange.enter(table)
            exchange.poll()
            return {**arrived, **self._await_stale(step, arrived)}

    def _adopt(
        self,
        step: int,
        arrived: Mapping[int, tuple[int, bytes]],
        batches: Mapping[BlockName, BatchStatistics],
        step_is_finite: Tensor | None,
    ) -> tuple[tuple[str, int], ...]:
        """Takes into use, on all ranks alike, what every rank holds."""
        adopted = []
        with self.counters.phase("adopt"):
            for group, (version, payload) in sorted(arrived.items()):
                self.parts.snapshots.adopt(group, version, payload)
                self.parts.exchange.adopt(group, version)
                self.pending[group] = [each for each in self.pending[group] if each > version]
                adopted.append((self.parts.groups[group].name, version))
            adopted += self._adopt_own(step)
            self.counters.adoptions += len(adopted)
            self._calibrate(step, batches, step_is_finite)
        return tuple(adopted)

    def _adopt_own(self, step: int) -> list[tuple[str, int]]:
        """Takes into use what every rank has made for itself in this step."""
        adopted = []
        for group in self.parts.groups:
            made = self.own_inversions.get(group.index)
            if made is None:
                continue
            self.parts.snapshots.adopt_own(group.index, step, made.preconditioners, made.measured)
            if group.courier_rank == self.parts.communicators.training.rank:  # each is counted once a run
                self.counters.completed[group.inverter.name] += 1
            adopted.append((group.name, step))
        self.own_inversions = {}
        return adopted

    def _calibrate(
        self, step: int, batches: Mapping[BlockName, BatchStatistics], step_is_finite: Tensor | None
    ) -> None:
        """Measures what the snapshots in use leave to the ranks: at their first step, then at each folding."""
        fresh = {index for index, count in self.parts.snapshots.calibrations.items() if count == 0}
        due = {
            group.index
            for group in self.parts.groups
            if group.index in self.calibrating and (group.index in fresh or self.parts.timetable.folds(group, step))
        }
        if due:
            samples = self.parts.reducer.local_samples(step, due, batches, step_is_finite)
            self.counters.bytes["statistics"] += calibrate(
                self.parts.groups,
                due,
                self.parts.snapshots,
                samples,
                self.parts.communicators.statistics,
                ema_decay=self.settings.ema_decay,
            )

    def _precondition(
        self,
        step: int,
        batches: Mapping[BlockName, BatchStatistics],
        learning_rate: Callable[[nn.Parameter], float] | None,
    ) -> None:
        """Multiplies the adopted inverses onto the gradients."""
        if learning_rate is None:
            return
        with self.counters.phase("precondition"):
            precondition_gradients(
                self._applications(step, self.damping(step), batches),
                kl_clip=self.settings.kl_clip,
                learning_rate=learning_rate,
                communicator=self.parts.communicators.statistics,
            )

    def directions(self, damping: float) -> dict[nn.Parameter, Tensor]:
        """Returns (F + damping I)^-1 grad by parameter, from the snapshots in use; nothing is written or kept."""
        applications = [
            replace(each, memories=[dict(memory) for memory in each.memories])
            for each in self._applications(max(self.next_step - 1, 0), damping, {})
        ]
        found: dict[nn.Parameter, Tensor] = {}
        for block, _, U in solve(applications, self.parts.communicators.statistics):
            found.update(zip(block.parameters(), block.from_matrix(U), strict=True))
        return found

    def _applications(
        self, step: int, damping: float, batches: Mapping[BlockName, BatchStatistics]
    ) -> list[Application]:
        applications = []
        for group in self.parts.groups:
            snapshot = self.parts.snapshots[group.index]
            decision = self._decision(group.index, step)
            self.counters.fallbacks.update(decision.reasons)
            blocks = [block for block in group.blocks if block.name in snapshot.preconditioners]
            if len(blocks) < len(group.blocks):
                self.counters.fallbacks["no_snapshot"] += len(group.blocks) - len(blocks)
                continue
            exchanged = any(each.exchanged for each in snapshot.preconditioners.values())
            takes_part = any(all(p.grad is not None for p in block.parameters()) for block in blocks)
            if not (takes_part or exchanged):  # all ranks enter an exchange, whatever gradients they have
                continue
            applications.append(
                Application(
                    blocks=blocks,
                    preconditioners=[snapshot.preconditioners[block.name] for block in blocks],
                    memories=[self.parts.snapshots.memories[block.name] for block in blocks],
                    damping=damping * decision.damping_factor,
                    fallback=decision.fallback,
                    solver=group.courier_rank,
                    rows=self._rows_of(group, batches),
                )
            )
        return applications

    def _rows_of(self, group: BlockGroup, batches: Mapping[BlockName, BatchStatistics]) -> RawRows | None:
        """Returns the step's rows of a block whose inverse is multiplied onto them."""
        name = group.blocks[0].name
        if not group.needs[name].applied_rows or name not in batches:
            return None
        return RawRows.of(batches[name])

    def _finish(self, step: int, adopted: tuple[tuple[str, int], ...]) -> StepReport:
        """Starts the next table and arms the capture for the next step."""
        parts, period = self.parts, self.settings.digest_period
        digest = parameter_digest(parts.parameters) if period and step % period == 0 else None
        with self.counters.phase("table"):
            parts.table.start(
                encode_table(
                    parts.ledger,
                    revision=parts.agreement.newest_revision,
                    stop=parts.agreement.stop_requested,
                ),
                digest,
            )
        self.counters.bytes["table"] = parts.table.bytes_sent
        self.counters.bytes["snapshots"] = parts.exchange.bytes_sent
        self.counters.bytes["jobs"] = parts.book.bytes_shipped
        self.counters.step_seconds.extend(self.counters.phase_seconds.items())
        self.counters.staleness.append(max(self.staleness(step).values()))
        for group, steps in parts.snapshots.settle(step).items():
            self.counters.fallbacks["no_snapshot"] += steps * len(parts.groups[group].blocks)
        self.next_step = step + 1
        self.arm()
        return StepReport(
            step=step,
            settings=parts.agreement.settings,
            stop=parts.agreement.stop,
            adopted=adopted,
            waited_seconds=parts.exchange.waited_seconds,
            phase_seconds=dict(self.counters.phase_seconds),
        )

    # Questions all ranks answer alike ------------------------------------------------------------------------------

    def damping(self, step: int) -> float:
        """Returns lambda at `step`: what people set last, else as configured.

        Raises:
            ConfigError: A schedule gave something else than a positive, finite number.
        """
        damping = self.parts.agreement.settings.damping or self.settings.damping_at(step)
        if not (math.isfinite(damping) and damping > 0.0):
            raise ConfigError(
                f"the damping schedule gave {damping!r} at step {step}; a positive, finite number is needed"
            )
        return damping

    def staleness(self, step: int) -> dict[str, int]:
        """Returns the age in steps of each group's snapshot at `step`; step + 1 where there is none."""
        return {group.name: step - self.parts.snapshots[group.index].version for group in self.parts.groups}

    def _due_for_adoption(self, step: int) -> dict[int, int]:
        """Versions that must be on all ranks before this step goes on: at the lag, and version 0 at step 0 always."""
        if self.settings.lag is None:
            return {index: 0 for index, versions in enumerate(self.pending) if versions} if step == 0 else {}
        latest = step - self.settings.lag if step else 0
        return {index: versions[0] for index, versions in enumerate(self.pending) if versions and versions[0] <= latest}

    def _decision(self, group: int, step: int) -> Decision:
        """What the staleness policy says of the snapshot in use; nothing where there is none yet."""
        snapshot = self.parts.snapshots[group]
        return self.settings.adoption.decide(step - snapshot.version) if snapshot.preconditioners else Decision()

    def _await_stale(self, step: int, arrived: Mapping[int, tuple[int, bytes]]) -> dict[int, tuple[int, bytes]]:
        """At the hard bound with "wait": blocks, with all ranks, for a version that is young enough.

        A group about to adopt a version that is young enough does not wait. Where the awaited inversion turns out to
        have failed, or none is under way, the old snapshot stays in use, counted as "kept".
        """
        stale = {}
        for index, versions in enumerate(self.pending):
            newest = arrived[index][0] if index in arrived else NO_VERSION
            under_way = [version for version in versions if version > newest]
            if not (under_way and self._decision(index, step).wait):
                continue
            if newest != NO_VERSION and not self.settings.adoption.decide(step - newest).wait:
                continue
            young = [version for version in under_way if not self.settings.adoption.decide(step - version).wait]
            stale[index] = young[0] if young else under_way[-1]
        for index in stale:
            self.counters.fallbacks["waited"] += 1
            if self.parts.ledger.in_flight(index):
                self.parts.exchange.abandon(index)
        return self._await(step, stale, exact=False)

    def _await(self, step: int, wanted: Mapping[int, int], *, exact: bool) -> dict[int, tuple[int, bytes]]:
        if not wanted:
            return {}
        self.ship_all()
        return self.parts.exchange.await_results(step, wanted, exact=exact)

    # This rank's share -----------------------------------------------------------------------------------------------

    def arm(self) -> None:
        """Tells the capture what to measure in the next step."""
        step, seed, rank = self.next_step, self.settings.seed, self.parts.communicators.training.rank
        self.calibrating = self._may_calibrate(step)
        requests = self.parts.timetable.requests(
            step,
            lambda name: block_seed(seed, name, step),
            own_seed_of=lambda name: rank_seed(block_seed(seed, name, step), rank),
            calibrating=self.calibrating,
        )
        self.parts.capture.arm(requests)

    def _may_calibrate(self, step: int) -> frozenset[int]:
        """Groups whose snapshot wants samples of `step`: it is new then, or one of its foldings is due."""
        return frozenset(
            group.index
            for group in self.parts.groups
            if any(needs.calibration is not None for needs in group.needs.values())
            and (
                self.parts.timetable.folds(group, step)
                or self.parts.snapshots.calibrations.get(group.index) == 0
                or self.parts.ledger.in_flight(group.index)
                or self._decision(group.index, step).wait
                or (self.settings.lag is not None and step - self.settings.lag in self.pending[group.index])
            )
        )

    def ship_all(self) -> None:
        """Ships also what has not reached the host yet: somebody is about to wait for it, or writes it down."""
        while self._unshipped:
            self._ship(self._unshipped.pop(0))

    def _ship(self, unshipped: _Unshipped) -> None:
        version = unshipped.reduced.version
        records = unshipped.reduced.records()
        for group in unshipped.reduced.groups:
            of_group = records[group.name]
            if not of_group:
                payload = failure_result({block.name: NO_STATISTICS for block in group.blocks})
                self.parts.book.put(_immediate(group.name, version, payload))
                self.parts.ledger.announce(group.index, version)
                continue
            payload = encode_job(
                inverter=group.inverter,
                statistics=of_group,
                damping=unshipped.damping,
                seeds={name: block_seed(self.settings.seed, name, version) for name in of_group},
                previous={} if group.inverter.online else unshipped.previous[group.name],
                threads=torch.get_num_threads(),
            )
            self.parts.book.ship(self._job(group.name, version, payload))

    def _job(self, group: str, version: int, payload: bytes) -> Job:
        return Job(
            run=self.parts.terms.run,
            epoch=self.parts.terms.epoch,
            group=group,
            version=version,
            payload=payload,
            deadline_seconds=self.parts.terms.deadline_seconds,
            fingerprint=self.parts.terms.fingerprint,
        )

    def resubmit(self, group: str, version: int, payload: bytes) -> None:
        """Ships a job that a checkpoint says was under way."""
        self.parts.book.ship(self._job(group, version, payload))

    def _collect(self) -> None:
        method = {group.name: group.inverter.name for group in self.parts.groups}
        index = {group.name: group.index for group in self.parts.groups}
        self.parts.book.collect()
        for result in self.parts.book.take_news():
            self.parts.ledger.announce(index[result.group], result.version)
            self.counters.completed[method[result.group]] += 1
            self.counters.inversion_seconds.append((method[result.group], result.seconds))
            self.counters.bytes["results"] += len(result.payload)


def _immediate(group: str, version: int, payload: bytes) -> JobResult:
    return JobResult(group=group, version=version, payload=payload, seconds=0.0, owner="none")
