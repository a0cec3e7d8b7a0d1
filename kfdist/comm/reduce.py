"""Sums over ranks: gradients in buckets that never change, and the statistics of the blocks that are due."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kfdist.comm.communicator import Communicator, Pending
from kfdist.errors import KfdistError
from kfdist.linalg.sparse_rows import dense_of, sparse_of

GRADIENT_BUCKET_BYTES = 25 * 1024 * 1024
"""Size of a gradient bucket; 25 MiB is what DDP and KAISA found to hide latency without delaying the first bucket."""


class GradientReducer:
    """Averages gradients over ranks in buckets fixed for the whole run, started while backward still runs.

    DDP rebuilds its buckets after the first backward, which changes the order of sums above two ranks; a resumed run
    would then differ in its last bits. Here the buckets follow from the parameters alone: reverse order of
    registration (about the order in which backward finishes), one dtype a bucket, at most `bucket_bytes` each. Buckets
    are started in that fixed order on every rank, as soon as they and all before them are full.

    With several ranks every parameter has a gradient afterwards: zero where no rank had one, so an optimizer applies
    its weight decay and momentum to it. One that was frozen since has none, and travels as zero. A sparse gradient
    stays sparse, with the rows of all ranks; it travels densely.

    Args:
        parameters: Equal in number, shape and order on all ranks; frozen ones are left out.
        communicator: The ranks.
        bucket_bytes: Largest size of a bucket, unless one parameter is larger.

    Attributes:
        bytes_per_step: What one rank contributes to a reduction.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        communicator: Communicator,
        *,
        bucket_bytes: int = GRADIENT_BUCKET_BYTES,
    ) -> None:
        self._communicator = communicator
        self._buckets = _fixed_buckets([p for p in parameters if p.requires_grad], bucket_bytes)
        self._bucket_of = {id(p): index for index, bucket in enumerate(self._buckets) for p in bucket}
        self._missing = [len(bucket) for bucket in self._buckets]
        self._seen: set[int] = set()
        self._started: list[tuple[Tensor, Pending]] = []
        self._overlap = True
        self.bytes_per_step = sum(p.numel() * p.element_size() for bucket in self._buckets for p in bucket)
        self._handles = [
            p.register_post_accumulate_grad_hook(self._on_gradient) for bucket in self._buckets for p in bucket
        ]

    def no_overlap(self) -> None:
        """Makes `reduce` do all the work: for several backwards a step, where a gradient is final only at the end.

        Call it on all ranks alike.
        """
        self._overlap = False

    def _on_gradient(self, parameter: Tensor) -> None:
        if not self._overlap or self._communicator.process_group is None:
            return
        bucket = self._bucket_of[id(parameter)]
        if id(parameter) in self._seen:
            if bucket < len(self._started):
                raise KfdistError(
                    "a gradient changed after its reduction had started: more than one backward before reduce(), or a "
                    "layer shared by several checkpointed segments; call no_overlap() once, before training"
                )
            return
        self._seen.add(id(parameter))
        self._missing[bucket] -= 1
        while len(self._started) < len(self._buckets) and self._missing[len(self._started)] == 0:
            self._start(len(self._started))

    def _start(self, index: int) -> None:
        """Starts bucket `index`; a parameter without a gradient on this rank counts as zero."""
        flat = torch.cat([_gradient_or_zeros(p).reshape(-1) for p in self._buckets[index]])
        self._started.append((flat, self._communicator.all_reduce_sum(flat)))

    def reduce(self) -> None:
        """Completes the step's reduction: afterwards every `.grad` is the mean over ranks. All ranks must call it."""
        if self._communicator.process_group is not None:
            while len(self._started) < len(self._buckets):
                self._start(len(self._started))
            for bucket, (flat, work) in zip(self._buckets, self._started, strict=True):
                work.wait()
                flat.div_(self._communicator.world_size)
                _scatter(flat, bucket)
        self._started.clear()
        self._seen.clear()
        self._missing = [len(bucket) for bucket in self._buckets]

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _gradient_or_zeros(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else dense_of(parameter.grad)


def _scatter(flat: Tensor, bucket: Sequence[nn.Parameter]) -> None:
    offset = 0
    for parameter in bucket:
        mean = flat[offset : offset + parameter.numel()].view_as(parameter)
        offset += parameter.numel()
        if parameter.grad is None and not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = mean.clone()
        elif parameter.grad.is_sparse:
            parameter.grad = sparse_of(mean)
        else:
            parameter.grad.copy_(mean)


def _fixed_buckets(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = []
    size = 0
    for parameter in reversed(parameters):
        own = parameter.numel() * parameter.element_size()
        if not buckets or size + own > bucket_bytes or buckets[-1][0].dtype != parameter.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += own
    return buckets


def reduce_flat(tensors: Sequence[Tensor], communicator: Communicator) -> list[Tensor]:
    """Sums each of `tensors` over the ranks, all in one flat bucket, and returns the sums in new storage.

    Args:
        tensors: On one device; shapes and dtypes equal on all ranks. Of several dtypes all travel as the widest.
        communicator: All its ranks must call this with the same list.
    """
    device = tensors[0].device
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    travelling = communicator.to_travel(flat)
    communicator.all_reduce_sum_(travelling)
    flat = travelling.to(device)
    pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape).to(tensor.dtype) for piece, tensor in zip(pieces, tensors, strict=True)]
