"""The memory that tensors of this process show: what a rank really holds, whoever of it has a name for it."""

import gc

import torch
from torch import Tensor

from kfdist.data.task import DataSet, Examples
from kfdist.runtime.preconditioner import Preconditioner


def storages() -> dict[int, int]:
    """Returns the bytes of the memory of all tensors on the CPU, by its address."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    tensors += [each.grad for each in tensors if each.is_leaf and each.grad is not None]
    real = [each.untyped_storage() for each in tensors if each.device.type == "cpu" and each.layout is torch.strided]
    return {storage.data_ptr(): storage.nbytes() for storage in real if storage.nbytes()}


def held_since(before: dict[int, int], data: DataSet, preconditioner: Preconditioner) -> int:
    """Returns the bytes that came since `before` and aren't the data's, with those that online jobs go on from."""
    held = sum(size for address, size in storages().items() if address not in before)
    for part in (data.train, data.test):
        if isinstance(part, Examples):
            held -= sum(each.untyped_storage().nbytes() for each in (part.inputs, part.labels))
    heads = [track.jobs.head for track in preconditioner.pipeline.tracks]
    return held + sum(len(head[1]) for head in heads if head is not None)
