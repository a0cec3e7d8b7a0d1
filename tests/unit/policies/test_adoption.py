"""The adoption protocol in every interleaving that Hypothesis finds: ranks at their own pace, late or damaged mail."""

import pytest
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.strategies import DataObject

from kfdist.policies.staleness import SMALLEST_DELAY
from tests.unit.policies.simulated_ranks import World

numbers = strategies.integers(0, 7)


class Adoption(RuleBasedStateMachine):
    """Owners, the network and the ranks take turns in any order."""

    @initialize(ranks=strategies.integers(1, 4), groups=strategies.integers(1, 3))
    def begin(self, ranks: int, groups: int) -> None:
        self.world = World(ranks, groups)

    @rule(group=numbers)
    def an_owner_finishes(self, group: int) -> None:
        self.world.produce(group % self.world.groups)

    @precondition(lambda self: any(self.world.produced))
    @rule(data=strategies.data())
    def an_old_version_is_announced_again(self, data: DataObject) -> None:
        group = data.draw(strategies.sampled_from([g for g, found in enumerate(self.world.produced) if found]))
        version = data.draw(strategies.sampled_from(sorted(self.world.produced[group])))
        self.world.courier(group).ledger.announce(version)

    @rule(number=numbers)
    def a_rank_moves(self, number: int) -> None:
        self.world.advance(number % len(self.world.ranks))

    @rule(order=strategies.permutations(range(4)))
    def all_ranks_make_a_step(self, order: list[int]) -> None:
        target = max(rank.step for rank in self.world.ranks) + 1
        self.run_to(target, order)

    @precondition(lambda self: self.world.travelling())
    @rule(data=strategies.data(), damaged=strategies.booleans())
    def a_payload_arrives(self, data: DataObject, damaged: bool) -> None:
        number, key = data.draw(strategies.sampled_from(self.world.travelling()))
        self.world.deliver(number, key, damaged=damaged)

    @rule(group=numbers)
    def the_policy_waits_at_the_next_step(self, group: int) -> None:
        step = max(rank.step for rank in self.world.ranks) + 1
        self.world.waits[step].add(group % self.world.groups)

    @invariant()
    def no_rank_is_more_than_a_step_ahead(self) -> None:
        steps = [rank.step for rank in self.world.ranks]
        assert max(steps) - min(steps) <= 1

    def run_to(self, target: int, order: list[int]) -> None:
        """Lets the ranks run in this order until all have made `target` steps; none may be stuck for good."""
        while any(rank.step < target for rank in self.world.ranks):
            moved = [
                self.world.advance(number)
                for number in order
                if number < len(self.world.ranks) and self.world.ranks[number].step < target
            ]
            assert any(moved), "all ranks wait for each other"

    def teardown(self) -> None:
        """Once everything is delivered whole, every rank gets to the newest version of every group."""
        if not hasattr(self, "world"):
            return
        for _ in range(8):  # a damaged broadcast is given up, sent again, received, agreed on: with delays, 8 steps
            for number, key in self.world.travelling():
                self.world.deliver(number, key, damaged=False)
            self.run_to(max(rank.step for rank in self.world.ranks) + 1, [0, 1, 2, 3])
        for group, produced in enumerate(self.world.produced):
            newest = max(produced, default=-1)
            adopted = [rank.tracks[group].ledger.adopted for rank in self.world.ranks]
            assert adopted == [newest] * len(self.world.ranks)


Adoption.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestAdoption = Adoption.TestCase


@pytest.mark.parametrize("ranks", [1, 4])
def test_nothing_is_adopted_before_the_smallest_delay_and_what_comes_at_once_is_adopted_then(ranks: int) -> None:
    world = World(ranks, 1)
    world.produce(0)  # version 0, in the step that ships its statistics
    for _ in range(SMALLEST_DELAY + 1):
        for move in range(3):
            for key in world.travelling() if move == 2 else ():
                world.deliver(*key, damaged=False)
            assert all(world.advance(number) for number in range(ranks))
    assert world.adoptions == {(SMALLEST_DELAY, 0): 0}
