"""What is due at which step, and what has to be measured for it: the same answers on all ranks."""

from collections.abc import Callable, Collection, Mapping, Sequence

from kfdist.capture.requests import Request
from kfdist.curvature.statistics import Needs
from kfdist.policies.schedule import Schedule
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.types import BlockName

_BOTH = frozenset({"A", "G"})


class Timetable:
    """The due dates of all groups.

    Args:
        schedule: The run's periods and the groups' phases.
        groups: All groups.
        world_size: Among how many ranks a budget of examples is shared.
        starves: Whether a group's newest result had no statistics; it is then due at every step until it has some.

    Raises:
        ConfigError: A method's own period doesn't fit the run's.
    """

    def __init__(
        self,
        schedule: Schedule,
        groups: Sequence[BlockGroup],
        *,
        world_size: int,
        starves: Callable[[BlockGroup], bool],
    ) -> None:
        self._schedule = schedule
        self.groups = groups
        self._world_size = world_size
        self._starves = starves
        self._periods = [_update_period(group, schedule) for group in groups]

    def folds(self, group: BlockGroup, step: int) -> bool:
        """Says whether the group's sums are folded."""
        return self._schedule.folds(group.index, step) or self._starves(group)

    def inverts(self, group: BlockGroup, step: int) -> bool:
        """Says whether the group's sums are reduced, for an inversion."""
        return self._schedule.inverts(group.index, step) or self._starves(group)

    def updates(self, group: BlockGroup, step: int) -> bool:
        """Says whether the group has a job; online methods have them more often than inversions."""
        return self._schedule.due(group.index, step, self._periods[group.index]) or self._starves(group)

    def foldings_until(self, group: BlockGroup, step: int) -> int:
        """Returns how many foldings of the group were due in steps 0 to `step`, both included."""
        return self._schedule.count_until(group.index, step, self._schedule.factor_period)

    def updates_until(self, group: BlockGroup, step: int) -> int:
        """Returns how many jobs of the group were due in steps 0 to `step`, both included."""
        return self._schedule.count_until(group.index, step, self._periods[group.index])

    def requests(
        self,
        step: int,
        seed_of: Callable[[str], int],
        *,
        own_seed_of: Callable[[str], int],
        calibrating: Collection[int],
    ) -> Mapping[BlockName, Request]:
        """Returns what is to be measured of each block at `step`; blocks of which nothing is are left out.

        Args:
            step: The step.
            seed_of: Gives a block's seed for sub-sampling at this step.
            own_seed_of: The same for what must differ from rank to rank.
            calibrating: Groups whose snapshot in use, or about to be, wants samples of this step.
        """
        requests = {}
        for group in self.groups:
            folds, updates = self.folds(group, step), self.updates(group, step)
            for block in group.blocks:
                needs = group.needs[block.name]
                request = Request(
                    sums=needs.sums if folds else frozenset(),
                    rows=_BOTH if needs.applied_rows else needs.increments if updates else frozenset(),
                    # An increment has room for so many rows of this rank; what an inverse is multiplied onto is whole.
                    most_rows=None if needs.applied_rows else needs.increment_rows // self._world_size,
                    sketch_size=needs.increment_rows,
                    sketch_seed=own_seed_of(block.name),
                    seed=seed_of(block.name),
                    **self._samples(needs, updates=updates, calibrates=group.index in calibrating),
                )
                if request.sums or request.rows or request.samples is not None:
                    requests[block.name] = request
        return requests

    def _samples(self, needs: Needs, *, updates: bool, calibrates: bool) -> dict[str, int | None]:
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
        }


def _update_period(group: BlockGroup, schedule: Schedule) -> int:
    """Returns the steps between two jobs; an online method without rows of a block has nothing to do in between."""
    own = group.inverter.update_period(schedule.factor_period, schedule.inverse_period)
    idle = group.inverter.online and not any(needs.increments for needs in group.needs.values())
    return schedule.inverse_period if idle else own
