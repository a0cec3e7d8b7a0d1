"""The step of a second-order method over ranks: capture, reduce, invert, exchange, adopt, precondition.

`Pipeline.step` is the algorithm; each verb is one call into a room. Every decision that makes ranks communicate is a
function of the step and of agreed tables, so all ranks always enter the same collectives in the same order.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from kfdist.capture.capture import Capture
from kfdist.comm.communicator import Communicator
from kfdist.linalg.digest import parameter_digest
from kfdist.runtime.adopt.adopting import Adopting
from kfdist.runtime.adopt.agreement import Agreement
from kfdist.runtime.adopt.calibration import Calibration
from kfdist.runtime.adopt.start import agree_on_start
from kfdist.runtime.apply.applications import Applying
from kfdist.runtime.counters import PipelineCounters
from kfdist.runtime.in_force import SettingsInForce
from kfdist.runtime.invert.shipping import Inverting
from kfdist.runtime.notices import Notices
from kfdist.runtime.plan.timetable import Timetable
from kfdist.runtime.reduce.noise_scale import NoiseScale
from kfdist.runtime.reduce.reducer import StatisticsReducer
from kfdist.runtime.settings import Settings, StepReport
from kfdist.runtime.step_lengths import GraftRatios, StepLengths
from kfdist.runtime.track import Track
from kfdist.types import GroupName


@dataclass(kw_only=True)
class Pipeline:
    """One rank's pipeline. All ranks call `step` once per training step, between backward and the optimizer's step.

    Attributes:
        settings: What it is told.
        in_force: The same, with what users have changed since.
        kinds: Of this rank's own objects, which can be alike but not equal, by name.
        training: The ranks.
        parameters: The model's, compared between ranks.
        tracks: One per group.
        timetable: What is due at which step.
        capture: Measures the model.
        agreement: Agrees on a table a step.
        reducer: Sums statistics.
        noise_scale: Compares the norms of gradients.
        inverting: Has them inverted.
        adopting: Takes the results into use.
        calibration: Measures what is in use.
        applying: Multiplies it onto the gradients.
        counters: What happened so far.
        lengths: How far steps move each group; of rank 0 alone.
        grafts: What grafts multiplied directions by; of rank 0 alone.
        notices: Warns of what measurements give reason to.
        next_step: The step that `step` will do next.
        statistics_step: The newest step whose statistics are folded; equals `next_step` after an interrupted step.
        started: Whether a step was begun or a state loaded; from then on no state can be loaded.
    """

    settings: Settings
    in_force: SettingsInForce
    kinds: Mapping[str, str]
    training: Communicator
    parameters: Sequence[nn.Parameter]
    tracks: Sequence[Track]
    timetable: Timetable
    capture: Capture
    agreement: Agreement
    reducer: StatisticsReducer
    noise_scale: NoiseScale
    inverting: Inverting
    adopting: Adopting
    calibration: Calibration
    applying: Applying
    counters: PipelineCounters
    lengths: StepLengths
    grafts: GraftRatios
    next_step: int = field(default=0, init=False)
    statistics_step: int = field(default=-1, init=False)
    started: bool = field(default=False, init=False)
    notices: Notices = field(init=False)

    def __post_init__(self) -> None:
        self.notices = Notices([block for track in self.tracks for block in track.group.blocks])
        self.arm()

    def step(
        self,
        *,
        step_is_finite: Tensor | None,
        learning_rates: Callable[[int], Callable[[nn.Parameter], float]] | None,
        into: dict[nn.Parameter, Tensor] | None = None,
    ) -> StepReport:
        """One step of the method; the order of the lines is the algorithm.

        Args:
            step_is_finite: Boolean scalar on the device, equal on all ranks; where false no statistics change. None:
                true.
            learning_rates: By step, the learning rate of a parameter, for the KL clip; None leaves the gradients as
                they are. Asked once the ranks have compared their arguments, so that none waits for one that gave up
                alone, and before anything is folded.
            into: Where directions go, by parameter, in the place of `.grad`. The next step may write over its tensors.

        Raises:
            Interrupted: On all ranks, inside an agreed wait; the step is then not done.
            RanksDiverged: The ranks' parameters differ.
            ConfigError: A schedule gave a damping, a clip or a learning rate out of range, there is no learning rate to
                clip by or, at the first step, the ranks were made differently.
            CheckpointError: At the first step, ranks would begin in different places.
        """
        step, phase = self.next_step, self.counters.phase
        self.started = True
        self.counters.begin_step()
        self.lengths.end()
        self.grafts.begin()
        with phase("agree"):
            table = self.agreement.table(step)
            if table is None:
                self._agree_on_start()
            self.capture.biases.settle(self.agreement.biases)
            self.adopting.follow()
            damping = self.in_force.damping(step)
            self.in_force.kl_clip(step)  # a bad one is refused before a folding
            learning_rate = None if learning_rates is None else learning_rates(step)
        with phase("capture"):
            due, norms = self.timetable.due(step), self.capture.norms.found()
            if self.statistics_step == step:
                due, norms = due.again(), None  # what an interruption left to do
            batches = self.capture.drain()
            self.noise_scale.heard_of(self.capture.micro_batches)
            if not self.capture.rests or self.notices.coming:
                self.notices.look(self.capture, step, level=5)
        with phase("fold"):
            self.reducer.fold(due, batches, step_is_finite)
        with phase("reduce"):
            self.noise_scale.measure(norms)
            reduced = self.reducer.reduce(due, batches, step_is_finite)
        with phase("invert"):
            inverted = self.inverting.take(reduced, damping)
            del reduced  # whoever inverts holds what is needed, as long as it is
        self.statistics_step = step
        with phase("exchange"):
            arrived = self.adopting.bring(step, table)
        with phase("adopt"):
            adopted = self.adopting.take(step, arrived, inverted)
        with phase("calibrate"):
            self.calibration.measure(step, batches, step_is_finite)
        if learning_rate is not None:
            with phase("precondition"):
                self.applying.apply(step, batches, learning_rate, step_is_finite, into)
        with phase("announce"):
            ledgers = [track.ledger for track in self.tracks if not track.group.own]
            self.agreement.announce(ledgers, self._digest(step), self.capture.biases.seen)
        return self._finish(step, adopted, damping)

    def directions(self, damping: float) -> dict[nn.Parameter, Tensor]:
        """Returns (F + damping I)^-1 grad by parameter, from the snapshots in use; nothing is written or kept."""
        return self.applying.directions(self.last_step, damping)

    @property
    def last_step(self) -> int:
        """The last step done; 0 before any."""
        return max(self.next_step - 1, 0)

    def staleness(self) -> dict[GroupName, int]:
        """Returns the age in steps of each group's snapshot at the last step done; one more where there is none."""
        return {track.group.name: track.staleness(self.last_step) for track in self.tracks}

    def arm(self) -> None:
        """Tells the capture what to measure in the next step."""
        step = self.next_step
        requests = self.timetable.requests(step, calibrating=self.calibration.ask(step))
        # Where something else is measured, it is known whether there were several micro-batches.
        norms = self.timetable.takes_norms(step, measures=bool(requests))
        self.capture.arm(requests, norms=norms and (self.noise_scale.can_tell or not requests))

    def close(self) -> None:
        """Completes what is under way between the ranks and stops measuring. All ranks must call it."""
        self.capture.close()
        self.agreement.finish()
        self.adopting.finish()

    def _agree_on_start(self) -> None:
        self.inverting.ship_all()  # what still travels to the host is under way, not lost
        methods = repr([(track.group.name, track.group.inverter) for track in self.tracks])
        agree_on_start(
            {**self.settings.canonical(self.next_step), "method": methods, **self.kinds},
            self.tracks,
            self.agreement,
            self.training,
            step=self.next_step,
            statistics_step=self.statistics_step,
            stages=self.timetable.stages,
            exact=self.in_force.settings.lag is not None,
        )
        self.agreement.agree_on_biases(self.capture.biases.seen)

    def _digest(self, step: int) -> Tensor | None:
        period, alone = self.settings.digest_period, self.training.world_size == 1
        return parameter_digest(self.parameters) if period and step % period == 0 and not alone else None

    def _outgrown(self, damping: float) -> frozenset[GroupName]:
        """Returns, and counts, the groups that need a new inversion because damping has fallen; alike on all ranks."""
        names = frozenset(track.group.name for track in self.tracks if track.outgrown(damping))
        self.counters.outgrown += len(names)
        return names

    def _finish(self, step: int, adopted: tuple[tuple[GroupName, int], ...], damping: float) -> StepReport:
        """Counts the step and arms the capture for the next one."""
        self.lengths.begin()
        self.counters.end_step(max((track.staleness(step) for track in self.tracks), default=0))
        self.adopting.settle(step)
        self.next_step = step + 1
        self.timetable.follow(self.in_force.settings, self.next_step)
        self.timetable.fresh = self.agreement.take_fresh() | self._outgrown(damping)
        self.arm()
        return StepReport(
            step=step,
            settings=self.agreement.settings,
            stop=self.agreement.stop,
            adopted=adopted,
            waited_seconds=self.counters.waited_seconds,
            phase_seconds=dict(self.counters.phase_seconds),
        )
