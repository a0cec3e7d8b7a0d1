"""Ranks as threads of one process, for the few collectives that a unit under test calls."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


class LockstepRank:
    """Stands in for a `Communicator`: one of several threads that meet in every collective."""

    device = torch.device("cpu")
    process_group = "threads"

    def __init__(self, rank: int, shared: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size = rank, len(shared)
        self._shared, self._barrier = shared, barrier

    def _everyone(self, value: Any) -> list[Any]:
        self._shared[self.rank] = value
        self._barrier.wait(20)
        found = list(self._shared)
        self._barrier.wait(20)
        return found

    def to_travel(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather_json(self, value: Any) -> list[Any]:
        return self._everyone(value)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        return [each.clone() for each in self._everyone(tensor)]

    def gather(self, tensor: Tensor, destination: int) -> list[Tensor]:
        parts = self.all_gather(tensor)
        return parts if self.rank == destination else []

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self.all_gather(tensor.clone())).sum(0))


def in_lockstep(world_size: int, function: Callable[[Any], Any]) -> list[Any]:
    """Returns what `function(communicator)` returned on each rank."""
    shared, barrier = [None] * world_size, threading.Barrier(world_size)
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(lambda rank: function(LockstepRank(rank, shared, barrier)), range(world_size)))
