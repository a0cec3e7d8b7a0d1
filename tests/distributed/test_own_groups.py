"""Groups of ours come about in any job: one Preconditioner after another, beside groups that only some ranks have."""

import gc
import weakref

import torch
import torch.distributed as dist

from kfdist.comm.communicator import Communicator
from kfdist.comm.communicator_set import CommunicatorSet, make_communicators
from kfdist.policies.staleness import FixedLag
from tests.support.adoption_runs import Record, TrainingRank, check_invariants
from tests.support.ranks import run_ranks


def total(own: CommunicatorSet) -> list[float]:
    """Every group sums 1, 2, 4, ... over the ranks."""
    values = [torch.tensor(float(2**own.training.rank)) for _ in range(3)]
    for communicator, value in zip((own.table, own.statistics, own.snapshots), values, strict=True):
        communicator.all_reduce_sum_(value)
    return [float(value) for value in values]


def beside_uneven_groups(communicator: Communicator) -> list[list[float]]:
    tensor_parallel = dist.new_group([0, 1])
    sets = [make_communicators(communicator) for _ in range(2)]
    totals = [total(own) for own in sets]
    if isinstance(tensor_parallel, dist.ProcessGroup):  # a member
        dist.destroy_process_group(tensor_parallel)
    return [*totals, total(make_communicators(communicator)), *(total(own) for own in sets)]


def test_ranks_that_are_in_further_groups_find_the_others() -> None:
    assert run_ranks(4, beside_uneven_groups) == [[[15.0] * 3] * 5] * 4


def one_after_another(communicator: Communicator) -> list[tuple[list[Record], list[Record]]]:
    """Two at a time: three times the older one ends and a new one begins beside the other."""
    records = []
    older = TrainingRank(communicator, adoption=FixedLag(1))
    for _ in range(3):
        newer = TrainingRank(communicator)
        records.append((older.run(older.pre.next_step + 6), newer.run(6)))
        older.close()
        older = newer
    older.close()
    return records


def test_preconditioners_follow_each_other_in_one_job() -> None:
    results = run_ranks(2, one_after_another)
    for turn in range(3):
        for which in range(2):
            check_invariants([of_rank[turn][which] for of_rank in results])


def gone_with_its_group(communicator: Communicator) -> bool:
    group = dist.new_group(list(range(communicator.world_size)))
    assert isinstance(group, dist.ProcessGroup)
    make_communicators(Communicator(group)).close()
    known = weakref.ref(group)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    return known() is None


def test_a_training_group_that_is_destroyed_is_held_by_nobody() -> None:
    assert run_ranks(2, gone_with_its_group) == [True, True]
