"""Ranks that meet in a store that dead ranks have used before."""

import threading
from collections.abc import Sequence

import pytest
import torch.distributed as dist  # noqa: TID251  # the store that torchrun's agents hold

from kfdist.comm.rendezvous import agree_on_prefix


def meet(store: dist.Store, ranks: Sequence[int], world_size: int) -> list[str]:
    """Returns what each of the ranks, coming in this order, takes for the name."""
    found: dict[int, str] = {}

    def come(rank: int) -> None:
        found[rank] = agree_on_prefix(store, rank, world_size, timeout_seconds=10)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
        thread.join(0.05)  # time enough to take what the dead left for new
    for thread in threads:
        thread.join()
    return [found[rank] for rank in ranks]


def test_ranks_agree_on_a_new_name_whatever_the_dead_left():
    store = dist.HashStore()
    names = set()
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        (name,) = set(meet(store, order, 3))
        names.add(name)
        # The next meeting fails: rank 1 dies before it comes.
        with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] didn't come within 0.1 s"):
            agree_on_prefix(store, 0, 3, timeout_seconds=0.1)
    assert len(names) == 3


def test_one_rank_meets_itself_and_others_wait_for_rank_0():
    assert agree_on_prefix(dist.HashStore(), 0, 1, timeout_seconds=1)
    with pytest.raises(TimeoutError, match=r"rank 0 didn't come within 0.1 s"):
        agree_on_prefix(dist.HashStore(), 1, 2, timeout_seconds=0.1)
