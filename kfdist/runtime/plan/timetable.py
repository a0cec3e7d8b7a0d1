"""What is due at which step, and what has to be measured for it: the same answers on all ranks."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kfdist.capture.requests import Request
from kfdist.curvature.statistics import Needs
from kfdist.policies.schedule import Schedule
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.runtime.settings import Settings
from kfdist.runtime.track import Track
from kfdist.seeds import block_seed, rank_seed
from kfdist.types import BlockName, GroupName

_BOTH = frozenset({"A", "G"})


@dataclass(frozen=True, kw_only=True)
class Due:
    """What is due at one step, settled before anything of the step is done.

    Attributes:
        step: The step.
        folding: The groups whose sums are folded.
        reducing: The groups whose statistics are reduced: for a job, or for an inversion by every rank.
    """

    step: int
    folding: tuple[Track, ...]
    reducing: tuple[Track, ...]

    def again(self) -> "Due":
        """Returns what is still due when the step was interrupted after its reduction and is done again.

        The sums are folded and the jobs under way; only what every rank inverts for itself is kept nowhere.
        """
        own = tuple(track for track in self.reducing if track.group.own)
        return replace(self, folding=(), reducing=own)


class Timetable:
    """The due dates of all groups, as they stand: one that hurries (see `Track`) is due at once.

    Args:
        schedules: The run's periods and the groups' phases, in the order in which they begin; the first at step 0.
        tracks: All groups.
        seed: The run's; with a block's name and the step it seeds what is sampled.
        rank: This rank.
        world_size: Among how many ranks a budget of examples is shared.
        settings: Where the schedules come from.

    Attributes:
        stages: How the periods have changed while the run trained; empty where they haven't.
        fresh: The groups that are folded and inverted at the step that is done next, whatever their period.

    Raises:
        ConfigError: A method's own period doesn't fit the run's.
    """

    def __init__(
        self,
        schedules: Sequence[Schedule],
        tracks: Sequence[Track],
        *,
        seed: int,
        rank: int,
        world_size: int,
        settings: Settings | None = None,
    ) -> None:
        self._tracks = tracks
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._followed = settings
        self.stages: list[list[int]] = []
        self.fresh: frozenset[GroupName] = frozenset()
        self._go_by(schedules)

    def follow(self, settings: Settings, begin: int) -> None:
        """Goes by the periods of `settings` from `begin` on, the step that is done next.

        With other periods than until then, all groups are folded and inverted at `begin`.
        """
        if settings is self._followed:
            return
        self._followed = settings
        schedules = settings.schedules(len(self._tracks), together=self._schedules[0].together)
        reached = [each for each in self._schedules if each.begin < begin]
        wanted = [each for each in schedules if each.begin <= begin][-1]
        if not reached or _periods_of(reached[-1]) != _periods_of(wanted):
            reached.append(replace(wanted, begin=begin if reached else 0))
            self.stages = [[each.begin, *_periods_of(each)] for each in reached]
        self._go_by([*reached, *(each for each in schedules if each.begin > begin)])

    def state_dict(self, next_step: int) -> dict[str, Any]:
        """Returns how the periods have changed while the run trained, as lists of step, factor and inverse period.

        Beside it the groups that are due at the next step, whatever their period. What is configured to begin after a
        change counts as one of them once it has begun, so that a resume doesn't begin it anew.
        """
        begun = [[each.begin, *_periods_of(each)] for each in self._schedules if each.begin <= next_step]
        return {"stages": begun if self.stages else [], "fresh": sorted(self.fresh)}

    def load_state_dict(self, state: Mapping[str, Any], settings: Settings) -> None:
        """Goes on from what `state_dict` returned; what `settings` say of it is for `follow`."""
        self.stages = [[int(each) for each in stage] for stage in state["stages"]]
        self.fresh = frozenset(state.get("fresh", ()))  # older checkpoints lack it
        if self.stages:
            first = settings.schedules(len(self._tracks), together=self._schedules[0].together)[0]
            self._followed = None
            self._go_by(
                [
                    replace(first, begin=begin, factor_period=factor, inverse_period=inverse)
                    for begin, factor, inverse in self.stages
                ]
            )

    def _go_by(self, schedules: Sequence[Schedule]) -> None:
        self._schedules = schedules
        self._periods = {
            each.begin: [_update_period(track.group, each) for track in self._tracks] for each in schedules
        }
        self._places = {each.begin: self._due_places(each) for each in schedules}
        self._samples_always = any(needs.applied_rows for track in self._tracks for needs in track.group.needs.values())

    def _due_places(self, schedule: Schedule) -> dict[int, dict[int, list[int]]]:
        """Returns, by period, which groups fold or have a job, by when in it."""
        places: dict[int, dict[int, list[int]]] = {}
        for place, own in enumerate(self._periods[schedule.begin]):
            for period in {schedule.factor_period, own}:
                at = schedule.phase(self._tracks[place].group.index) % period
                places.setdefault(period, {}).setdefault(at, []).append(place)
        return places

    def _perhaps_due(self, step: int, others: Collection[int] = ()) -> list[Track]:
        """Returns the groups that may fold or have a job at `step`, in order: most steps have few, and each is asked.

        Args:
            step: The step.
            others: Places of groups that are asked in any case.
        """
        schedule = self._at(step)
        past = step - schedule.begin
        if past == 0 or self.fresh:
            return list(self._tracks)
        found = {place for place, track in enumerate(self._tracks) if track.without_statistics}
        for period, places in self._places[schedule.begin].items():
            found.update(places.get(past % period, ()))
        return [self._tracks[place] for place in sorted(found.union(others))]

    def _at(self, step: int) -> Schedule:
        """Returns the schedule that holds at `step`."""
        last = self._schedules[-1]  # asked several times a group and step
        return last if last.begin <= step else next(each for each in reversed(self._schedules) if each.begin <= step)

    def inverse_period(self, step: int) -> int:
        """Returns the steps between two inversions of a group at `step`."""
        return self._at(step).inverse_period

    def update_period(self, track: Track, step: int) -> int:
        """Returns the steps between two jobs of a group at `step`: where its method has a period of its own, that."""
        return self._periods[self._at(step).begin][track.group.index]

    def takes_norms(self, step: int, *, measures: bool) -> bool:
        """Says whether `step` takes the norms of gradients: with the first group's foldings.

        Args:
            step: The step.
            measures: Whether something else is measured at it; else compiled code isn't made to run eagerly for it.
        """
        schedule = self._at(step)
        return schedule.folds(0, step) and (measures or not schedule.together)

    def folds(self, track: Track, step: int) -> bool:
        """Says whether the group's sums are folded."""
        return track.hurries or track.group.name in self.fresh or self._at(step).folds(track.group.index, step)

    def inverts(self, track: Track, step: int) -> bool:
        """Says whether the group's sums are reduced, for an inversion."""
        return self._at(step).inverts(track.group.index, step) or self._out_of_turn(track, step)

    def updates(self, track: Track, step: int) -> bool:
        """Says whether the group has a job; online methods have them more often than inversions."""
        period = self.update_period(track, step)
        return self._at(step).due(track.group.index, step, period) or self._out_of_turn(track, step)

    def _out_of_turn(self, track: Track, step: int) -> bool:
        """Says whether a group is inverted out of turn: as users want it, or because it starves.

        One that starves is tried again at once or, where its method is patient or that was in vain, when it folds.
        """
        return track.group.name in self.fresh or (track.starves and self.folds(track, step))

    def due(self, step: int) -> Due:
        """Returns what is due at `step`."""
        tracks = self._perhaps_due(step)
        return Due(
            step=step,
            folding=tuple([track for track in tracks if self.folds(track, step)]),
            reducing=tuple([track for track in tracks if self.updates(track, step)]),
        )

    def foldings_until(self, track: Track, step: int) -> int:
        """Returns how many foldings of the group were due in steps 0 to `step`, both included."""
        return self._count(track, step, {each.begin: each.factor_period for each in self._schedules})

    def updates_until(self, track: Track, step: int) -> int:
        """Returns how many jobs of the group were due in steps 0 to `step`, both included."""
        return self._count(track, step, {begin: periods[track.group.index] for begin, periods in self._periods.items()})

    def _count(self, track: Track, step: int, periods: Mapping[int, int]) -> int:
        """Counts what was due until `step`, every `periods[begin]` steps under the schedule that begins then."""
        ends = [schedule.begin - 1 for schedule in self._schedules[1:]]
        return sum(
            schedule.count_until(track.group.index, min(step, end), periods[schedule.begin])
            for schedule, end in zip(self._schedules, [*ends, step], strict=True)
            if schedule.begin <= step
        )

    def requests(self, step: int, *, calibrating: Collection[int]) -> Mapping[BlockName, Request]:
        """Returns what is to be measured of each block at `step`; blocks with nothing to measure are left out.

        Args:
            step: The step.
            calibrating: Groups whose snapshot in use, or about to be, wants samples of this step.
        """
        requests = {}
        for track in self._tracks if self._samples_always else self._perhaps_due(step, calibrating):
            if track.group.of_gradients:
                continue
            group, folds, updates = track.group, self.folds(track, step), self.updates(track, step)
            calibrates = group.index in calibrating
            for block in group.blocks:
                needs = group.needs[block.name]
                if not (folds or updates or calibrates or needs.applied_rows):
                    continue  # on most steps, for most blocks: seeds and requests cost as much as a small product
                seed = block_seed(self._seed, block.name, step)
                request = Request(
                    sums=needs.sums if folds else frozenset(),
                    rows=_BOTH if needs.applied_rows else needs.increments if updates else frozenset(),
                    # An increment has room for so many rows of this rank; what an inverse is multiplied onto is whole.
                    most_rows=None if needs.applied_rows else needs.increment_rows // self._world_size,
                    sketch_size=needs.increment_rows,
                    sketch_seed=rank_seed(seed, self._rank),
                    # What there is at first is of one batch: all of it, whatever it costs.
                    whole=folds and self.foldings_until(track, step) <= 1,
                    seed=seed,
                    **self._samples(needs, updates=updates, calibrates=calibrates),
                )
                if request.sums or request.rows or request.samples is not None:
                    requests[block.name] = request
        return requests

    def _samples(self, needs: Needs, *, updates: bool, calibrates: bool) -> dict[str, Any]:
        """Returns this rank's share of the larger budget, at least one of each; nothing where no samples are due."""
        due = [needs.samples if updates else None, needs.calibration if calibrates else None]
        budgets = [budget for budget in due if budget is not None]
        if not budgets:
            return {}
        rows = [budget.rows for budget in budgets if budget.rows is not None]
        columns = [budget.columns for budget in budgets if budget.columns is not None]
        return {
            "samples": -(-max(budget.examples for budget in budgets) // self._world_size),
            "sample_rows": -(-max(rows) // self._world_size) if len(rows) == len(budgets) else None,
            "sample_columns": max(columns) if len(columns) == len(budgets) else None,
            "samples_pooled": any(budget.pooled for budget in budgets),
        }


def _periods_of(schedule: Schedule) -> tuple[int, int]:
    return schedule.factor_period, schedule.inverse_period


def _update_period(group: BlockGroup, schedule: Schedule) -> int:
    """Returns the steps between two jobs; an online method without rows of a block has nothing to do in between."""
    own = group.inverter.update_period(schedule.factor_period, schedule.inverse_period)
    idle = group.inverter.online and not any(needs.increments for needs in group.needs.values())
    return schedule.inverse_period if idle else own
