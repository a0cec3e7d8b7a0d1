"""Communicators: a process group with the few collectives kfdist uses, or a single process with the same face.

The code above this package never asks whether it is distributed: a world of one goes through the same calls.
"""

import json
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from kfdist.comm.rendezvous import torchruns_store
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.system.seat import ranks_by_environment


class Pending(Protocol):
    """A collective in flight."""

    def wait(self) -> object:
        """Completes it: on a CPU the result is there, on a device the current stream is ordered after it."""
        ...

    def is_completed(self) -> bool:
        """Says whether `wait` would return at once."""
        ...


class _Done:
    """The collective of a world of one: complete when started."""

    def wait(self) -> None:
        return None

    def is_completed(self) -> bool:
        return True


class Communicator:
    """A process group, or a single process where `process_group` is None.

    Every method that communicates must be entered by all ranks of the group, in the same order.

    Attributes:
        process_group: The torch process group, None for a single process.
        rank: This process's rank in the group.
        world_size: How many ranks the group has.
    """

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self.process_group = process_group
        self.rank = dist.get_rank(process_group) if process_group is not None else 0
        self.world_size = dist.get_world_size(process_group) if process_group is not None else 1

    @property
    def device(self) -> torch.device:
        """Where a tensor has to lie to travel: on CUDA where the group takes nothing else, else on the CPU."""
        if self.process_group is not None and dist.get_backend(self.process_group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def to_travel(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a tensor where it has to lie to travel: as it is where there is nobody to travel to."""
        return tensor if self.process_group is None else tensor.to(self.device)

    def global_rank(self, rank: int) -> int:
        """Translates a rank of this group to the default group's numbering, which torch's broadcast asks for."""
        return rank if self.process_group is None else dist.get_global_rank(self.process_group, rank)

    def all_reduce_sum(self, tensor: torch.Tensor) -> Pending:
        """Starts summing `tensor` over the ranks, in place."""
        return self._start(dist.all_reduce, tensor, dist.ReduceOp.SUM)

    def all_reduce_max(self, tensor: torch.Tensor) -> Pending:
        """Starts taking the elementwise maximum of `tensor` over the ranks, in place."""
        return self._start(dist.all_reduce, tensor, dist.ReduceOp.MAX)

    def broadcast(self, tensor: torch.Tensor, source: int) -> Pending:
        """Starts copying `tensor` from rank `source` (of this group) to all, in place."""
        return self._start(dist.broadcast, tensor, self.global_rank(source))

    def _start(self, collective: Callable[..., Any], *arguments: Any) -> Pending:
        if self.process_group is None:
            return _Done()
        work = collective(*arguments, group=self.process_group, async_op=True)
        if work is None:  # torch's answer to a rank outside the group
            raise EnvironmentFault("this process is not a member of the process group it was asked to communicate in")
        return work

    def gather(self, tensor: torch.Tensor, destination: int) -> list[torch.Tensor]:
        """Returns every rank's `tensor`, of equal shape, in rank order on rank `destination`; nothing on the others."""
        if self.process_group is None:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)] if self.rank == destination else []
        dist.gather(tensor, parts or None, self.global_rank(destination), group=self.process_group)
        return parts

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Returns every rank's `tensor`, of equal shape, in rank order on all ranks."""
        if self.process_group is None:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor, group=self.process_group)
        return parts

    def all_reduce_sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums `tensor` over the ranks in place and waits."""
        self.all_reduce_sum(tensor).wait()
        return tensor

    def broadcast_tensors_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrites every rank's `tensors` with those of rank 0."""
        # Detached: autograd would record a collective on parameters and run it again backwards.
        for work in [self.broadcast(tensor.detach(), 0) for tensor in tensors]:
            work.wait()

    def send(self, content: torch.Tensor, target: int) -> None:
        """Sends `content`, of bytes, to rank `target`, which must `receive` it; the other ranks have no part in it."""
        dist.send(content.to(self.device), self.global_rank(target), self.process_group)

    def receive(self, size: int, source: int) -> bytes:
        """Returns the `size` bytes that rank `source` sends to this one."""
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        dist.recv(buffer, self.global_rank(source), self.process_group)
        return buffer.cpu().numpy().tobytes()

    def broadcast_json(self, value: Any) -> Any:
        """Returns rank 0's `value`, anything JSON can say, on all ranks."""
        return self.all_gather_json(value if self.rank == 0 else None)[0]

    def all_gather_json(self, value: Any) -> list[Any]:
        """Returns every rank's `value`, anything JSON can say, in rank order. JSON: no pickle crosses the wire."""
        if self.process_group is None:
            return [json.loads(json.dumps(value))]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        sizes[self.rank] = text.numel()
        self.all_reduce_sum_(sizes)
        buffer = torch.zeros(self.world_size, int(sizes.max()), dtype=torch.uint8, device=self.device)
        buffer[self.rank, : text.numel()] = text
        self.all_reduce_sum_(buffer)
        rows = buffer.cpu()
        return [json.loads(rows[rank, : int(size)].numpy().tobytes()) for rank, size in enumerate(sizes.tolist())]

    def close(self) -> None:
        """Leaves the group; only for a group this process made with `join_training_group`."""
        if self.process_group is not None and dist.is_initialized():
            dist.destroy_process_group(None)
            self.process_group = None


def communicator(process_group: dist.ProcessGroup | None = None) -> Communicator:
    """Wraps `process_group`; without one, the default group if there is one, else this single process."""
    if process_group is None and dist.is_available() and dist.is_initialized():
        process_group = dist.group.WORLD
    return Communicator(process_group)


def training_communicator(process_group: dist.ProcessGroup | None = None) -> Communicator:
    """Does what `communicator` does, but never makes a process that was started beside others train alone.

    Raises:
        ConfigError: There is no group, and torchrun's variables say that this process is one of several.
    """
    found = communicator(process_group)
    if found.process_group is None and "RANK" in os.environ and (count := ranks_by_environment()) > 1:
        # A warning would go under in the output of so many processes, whose losses fall all the same.
        raise ConfigError(
            f"RANK is {os.environ['RANK']} and WORLD_SIZE is {count}, so {count} processes were started to train "
            "together, and there is no process group by which they would: each would train a model of its own. Call "
            "torch.distributed.init_process_group() before (Accelerate's Accelerator() does it, too), or give "
            "`process_group`. If each process is meant to train a model of its own, take RANK and WORLD_SIZE out of "
            "its os.environ before; under a service each then needs a run's name of its own"
        )
    return found


def join_training_group(*, timeout_seconds: float = 600.0, device: str = "cpu") -> Communicator:
    """Joins the group that torchrun's variables describe, over NCCL for CUDA and gloo for the CPU.

    Args:
        timeout_seconds: How long a collective may take before it raises.
        device: "cpu" or "cuda"; picks the backend.

    Returns:
        The training group; a single process where RANK is unset.

    Raises:
        EnvironmentFault: The other ranks could not be reached, or this one isn't told which it is.
    """
    if "RANK" not in os.environ:
        if (count := ranks_by_environment()) > 1:
            raise EnvironmentFault(
                f"WORLD_SIZE is {count} and RANK isn't set: this process can't know which of {count} ranks it is, and "
                "alone it would train beside the others under the run's name. Start all ranks with torchrun (or "
                "`kfdist train`), or take WORLD_SIZE out of its environment"
            )
        return Communicator(None)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    try:
        dist.init_process_group(
            backend,
            timeout=timedelta(seconds=timeout_seconds),
            store=torchruns_store(timeout_seconds),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ.get("WORLD_SIZE", "-1")),  # torch says what is missing
        )
    except (RuntimeError, ValueError, TimeoutError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise EnvironmentFault(
            f"rank {os.environ['RANK']} could not join the training group at {address}: {error}. "
            "Start all ranks with torchrun (or `kfdist train`) and check MASTER_ADDR and MASTER_PORT."
        ) from error
    return Communicator(dist.group.WORLD)
