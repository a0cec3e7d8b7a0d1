"""The process groups kfdist makes for itself beside the training group."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from typing_extensions import override

from kfdist.comm.communicator import Communicator, Pending
from kfdist.errors import EnvironmentFault
from kfdist.torch_internals import group_count, group_timeout

TWO_LEVELS_ABOVE = 64
"""Ranks above which gloo reduces the table by node first."""


@dataclass(frozen=True)
class CommunicatorSet:
    """kfdist's groups beside the training group, so that its collectives never mix with the trainer's.

    Attributes:
        training: The group the ranks train in.
        table: Carries the agreed table and the agreed rounds.
        statistics: Carries the reduction of the statistics.
        snapshots: Carries the payloads of snapshots.
    """

    training: Communicator
    table: Communicator
    statistics: Communicator
    snapshots: Communicator

    def close(self) -> None:
        """Gives the groups back, quiet, for the next set over these ranks; all ranks must, in the same order."""
        if self.training.process_group is not None:
            _MADE[self.training.process_group].free.append((self.table, self.statistics, self.snapshots))


@dataclass
class _Made:
    """What was made for one training group.

    Groups are kept and used again, not destroyed: torch would give their names to later groups over the same ranks,
    which would then find the dead ones' addresses in the store.

    Attributes:
        free: Groups that were given back; without the training group, whose end is to be the end of this, too.
        groups: The most groups this process had when it made one of kfdist's; the next one's name follows from it.
    """

    free: list[tuple[Communicator, Communicator, Communicator]] = field(default_factory=list)
    groups: int = 0


_MADE: WeakKeyDictionary[dist.ProcessGroup, _Made] = WeakKeyDictionary()


class TwoLevelCommunicator(Communicator):
    """A group whose small maxima go over each node's ranks first, then over one leader per node, then back.

    gloo passes a vector around all ranks, so a small one takes 2 (W - 1) hops of the network; here it takes that many
    only between nodes. The first level runs in the background, the others in `wait`.

    Args:
        process_group: All ranks.
        node: The ranks of this node.
        leaders: The first rank of every node; on the other ranks a group of one.

    Attributes:
        levels: The groups of both levels.
    """

    def __init__(self, process_group: dist.ProcessGroup, node: Communicator, leaders: Communicator) -> None:
        super().__init__(process_group)
        self.levels = (node, leaders)

    @override
    def all_reduce_max(self, tensor: torch.Tensor) -> Pending:
        return _TwoLevelMaximum(tensor, *self.levels)


class _TwoLevelMaximum:
    def __init__(self, tensor: torch.Tensor, node: Communicator, leaders: Communicator) -> None:
        self._tensor, self._node, self._leaders = tensor, node, leaders
        self._within = node.all_reduce_max(tensor)

    def wait(self) -> None:
        self._within.wait()
        self._leaders.all_reduce_max(self._tensor).wait()
        self._node.broadcast(self._tensor, 0).wait()

    def is_completed(self) -> bool:
        return False  # the upper levels run in `wait`


def make_communicators(
    training: Communicator, *, two_levels_above: int = TWO_LEVELS_ABOVE, node: str | None = None
) -> CommunicatorSet:
    """Makes the table, statistics and snapshot groups, in this order, with the training group's ranks and timeout.

    Only members of the training group call this (`use_local_synchronization`), so disjoint training groups in one job
    do not wait for each other.

    Args:
        training: The ranks that train together.
        two_levels_above: Over more ranks than this, gloo's table is reduced by node first.
        node: The name of this rank's node; None: the host's.
    """
    if training.process_group is None:
        return CommunicatorSet(training, training, training, training)
    made = _MADE.setdefault(training.process_group, _Made())
    if made.free:
        return CommunicatorSet(training, *made.free.pop())
    padding = _make_equally_many(training, made)
    ranks = dist.get_process_group_ranks(training.process_group)
    whole = _group(training, "table", ranks)
    table = Communicator(whole)
    if training.world_size > two_levels_above and training.device.type == "cpu":
        names = training.all_gather_json(node or socket.gethostname())
        nodes = [[r for r, name in zip(ranks, names, strict=True) if name == each] for each in dict.fromkeys(names)]
        if 1 < len(nodes) < len(ranks):
            table = TwoLevelCommunicator(whole, *_levels(training, nodes))
    statistics, snapshots = (Communicator(_group(training, name, ranks)) for name in ("statistics", "snapshots"))
    made.groups = group_count()
    for group in padding:
        dist.destroy_process_group(group)
    return CommunicatorSet(training, table, statistics, snapshots)


def _levels(training: Communicator, nodes: Sequence[Sequence[int]]) -> tuple[Communicator, Communicator]:
    rank = dist.get_rank()
    node = next(members for members in nodes if rank in members)
    firsts = [members[0] for members in nodes]
    # A group of one on the other ranks: all have to make equally many.
    across = firsts if rank in firsts else [rank]
    return Communicator(_group(training, "node", node)), Communicator(_group(training, "leaders", across))


def _group(training: Communicator, name: str, ranks: Sequence[int]) -> dist.ProcessGroup:
    assert training.process_group is not None
    timeout = group_timeout(training.process_group, training.device)
    group = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True, group_desc=f"kfdist_{name}")
    if not isinstance(group, dist.ProcessGroup):
        raise EnvironmentFault(f"torch.distributed made no {name} group for ranks {ranks}")
    return group


def _make_equally_many(training: Communicator, made: _Made) -> list[dist.ProcessGroup]:
    """Makes groups of one until all ranks have equally many, and more than when any group of kfdist's was made.

    torch names a locally synchronized group by its ranks and the number of groups that the process has: ranks of which
    some are members of further groups (a tensor-parallel one, say) would wait for each other under different names.
    """
    target = max(training.all_gather_json(max(group_count(), made.groups)))
    padding = []
    while group_count() < target:
        padding.append(_group(training, "padding", [dist.get_rank()]))
    return padding
