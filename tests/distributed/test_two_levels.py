"""The table over nodes and their leaders says what the flat one says."""

import pytest
import torch

from kfdist.comm.background import TableExchange
from kfdist.comm.communicator import Communicator
from kfdist.comm.communicator_set import TwoLevelCommunicator, make_communicators
from kfdist.policies.staleness import FixedLag
from kfdist.runtime import assembly
from tests.support.adoption_runs import Record, TrainingRank, check_invariants
from tests.support.faults import EACH, Faults
from tests.support.ranks import run_ranks

TURNS, WIDTH = 20, 7


def tables(communicator: Communicator, nodes: str) -> tuple[list[list[int]], bool]:
    """Alternates tables and rounds of random columns, the same on each run of a rank."""
    own = make_communicators(communicator, two_levels_above=3, node=nodes[communicator.rank])
    exchange = TableExchange(own.table)
    generator = torch.Generator().manual_seed(communicator.rank)
    seen = []
    for turn in range(TURNS):
        columns = torch.randint(-(2**62), 2**62, (WIDTH,), generator=generator).tolist()
        exchange.start(columns)
        completed = exchange.complete()
        assert completed is not None
        seen += [completed, exchange.agree(columns[: turn % WIDTH + 1])]
    two_levels = isinstance(own.table, TwoLevelCommunicator)
    own.close()
    return seen, two_levels


@pytest.mark.parametrize(("nodes", "two_levels"), [("aabb", True), ("abca", True), ("aaaa", False), ("abcd", False)])
def test_every_rank_sees_the_maximum_over_all(nodes: str, two_levels: bool) -> None:
    generators = [torch.Generator().manual_seed(rank) for rank in range(4)]
    expected = []
    for turn in range(TURNS):
        columns = torch.stack([torch.randint(-(2**62), 2**62, (WIDTH,), generator=each) for each in generators])
        highest = columns.amax(0).tolist()
        expected += [highest, highest[: turn % WIDTH + 1]]
    assert run_ranks(4, tables, nodes) == [(expected, two_levels)] * 4


def train(communicator: Communicator, nodes: str, adoption: str | FixedLag) -> list[Record]:
    if nodes:
        levels = make_communicators(communicator, two_levels_above=3, node=nodes[communicator.rank])
        assert isinstance(levels.table, TwoLevelCommunicator)
        assembly.make_communicators = lambda training: levels
    rank = TrainingRank(communicator, adoption=adoption)
    records = rank.run(16)
    rank.close()
    return records


@pytest.mark.slow
def test_training_with_two_levels_keeps_ranks_equal_as_soon_as_possible(faults: Faults) -> None:
    faults.at(result=EACH).late(5)
    check_invariants(run_ranks(4, train, "abab", "asap"))


def test_training_with_two_levels_is_the_same_training(faults: Faults) -> None:
    faults.at(result=EACH).late(5)
    flat, levels = (run_ranks(4, train, nodes, FixedLag(2)) for nodes in ("", "abab"))
    check_invariants(levels)
    assert [record.parameters for record in levels[0]] == [record.parameters for record in flat[0]]
