"""The apply verb: which inverse is multiplied onto which gradient at a step, and what is in force instead."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from kfdist.comm.communicator import Communicator
from kfdist.curvature.averages import BatchStatistics
from kfdist.policies.staleness import NOTHING
from kfdist.runtime.apply.directions import Application, precondition_gradients, solve
from kfdist.runtime.apply.side_by_side import Together
from kfdist.runtime.apply.units_together import UnitsTogether
from kfdist.runtime.counters import PipelineCounters
from kfdist.runtime.in_force import SettingsInForce
from kfdist.runtime.track import Track
from kfdist.types import BlockName


@dataclass(frozen=True)
class Applying:
    """Multiplies the snapshots in use onto the gradients. All ranks make the same calls.

    Attributes:
        tracks: All groups.
        in_force: The settings of the method in force.
        communicator: Carries directions that one rank computes for all.
        counters: Counts what is less than a fresh inverse.
        together: Applies those of small blocks in one go, where it can.
        units: Does the same of blocks of units.
    """

    tracks: Sequence[Track]
    in_force: SettingsInForce
    communicator: Communicator
    counters: PipelineCounters
    together: Together = field(default_factory=Together)
    units: UnitsTogether = field(default_factory=UnitsTogether)

    def apply(
        self,
        step: int,
        batches: Mapping[BlockName, BatchStatistics],
        learning_rate: Callable[[nn.Parameter], float],
        step_is_finite: Tensor | None,
        into: dict[nn.Parameter, Tensor] | None,
    ) -> None:
        """Replaces the gradients in `.grad` by clipped directions; or puts these elsewhere.

        Args:
            step: The step.
            batches: This rank's batch, for inverses that are multiplied onto rows.
            learning_rate: The learning rate of a parameter, for the KL clip.
            step_is_finite: Boolean scalar; where false the gradients are nothing to learn from. None: true.
            into: Where the directions go, by parameter, in the place of `.grad`.
        """
        damping, kl_clip = self.in_force.damping(step), self.in_force.kl_clip(step)
        applications = self._applications(step, damping, batches)
        steady = not callable(self.in_force.settings.damping)
        for each in applications:
            for memory in each.memories:
                memory.steady = steady and each.damping == damping
                memory.learns = True if step_is_finite is None else step_is_finite
        factor = precondition_gradients(
            self.together.apply(applications, into),
            kl_clip=kl_clip,
            learning_rate=learning_rate,
            communicator=self.communicator,
            into=into,
            together=self.units,
        )
        if factor is not None or kl_clip is None:
            self.counters.kl_clip_factor = factor

    def directions(self, step: int, damping: float) -> dict[nn.Parameter, Tensor]:
        """Returns (F + damping I)^-1 grad by parameter, from the snapshots in use; nothing is written or kept."""
        applications = [
            replace(each, memories=[replace(memory.copy(), steady=False, learns=False) for memory in each.memories])
            for each in self._applications(step, damping, {})
        ]
        found: dict[nn.Parameter, Tensor] = {}
        for solved in solve(applications, self.communicator, multiplied=False):
            solved.write(None, found)
        return found

    def _applications(
        self, step: int, damping: float, batches: Mapping[BlockName, BatchStatistics]
    ) -> list[Application]:
        found = [self._application(track, step, damping, batches) for track in self.tracks]
        return [each for each in found if each is not None]

    def _application(
        self, track: Track, step: int, damping: float, batches: Mapping[BlockName, BatchStatistics]
    ) -> Application | None:
        """Returns how a group is treated at `step`; None where its gradients stay as they are."""
        group, inverses = track.group, track.snapshot.preconditioners
        decision = track.decision(step, self.in_force.settings.adoption)
        if decision is not NOTHING:
            # What is normalised has its size from the newest gradients, however old its basis.
            normalised = group.inverter.produces.normalised
            decision = decision.followed(damps=group.obeys_damping, scales=not normalised)
            self.counters.fallbacks.update(decision.reasons)
        elif (known := _as_before(track, damping)) is not None:
            return known
        lacking = sum(block.name not in inverses for block in group.blocks)
        if lacking:
            self.counters.fallbacks["no_snapshot"] += lacking
            return None
        if not any(block.takes_part for block in group.blocks):
            # All ranks enter an exchange, whatever gradients they have.
            if not any(each.exchanged for each in inverses.values()):
                return None
        # The plan says whose rows they are, not the inverse: the first step's are measured, and runs whose rows aren't
        # those of the gradient are refused, before there is any inverse. Such a group has a single block.
        first = group.blocks[0].name
        found = Application(
            blocks=group.blocks,
            preconditioners=[inverses[block.name] for block in group.blocks],
            memories=[track.memories[block.name] for block in group.blocks],
            damping=damping * decision.damping_factor,
            fallback=decision.fallback,
            solver=group.courier_rank,
            rows=batches.get(first) if group.needs[first].applied_rows else None,
        )
        if decision is NOTHING and not group.needs[first].applied_rows:
            track.prepared = found
        return found


def _as_before(track: Track, damping: float) -> Application | None:
    """Returns how a group was treated at an earlier step, where the same is to be done now."""
    known = track.prepared
    if not isinstance(known, Application) or known.damping != damping:
        return None
    return known if all([block.takes_part for block in known.blocks]) else None
