"""Tensors of the host on their way to a device, for which no step waits."""

import torch
from jaxtyping import Shaped
from torch import Tensor

TAKEN_AT_ONCE = 1 << 16
"""Bytes up to which CUDA takes pageable memory along with the command that copies it ("Asynchronous Concurrent
Execution" in the CUDA C++ programming guide)."""


def sent(tensor: Shaped[Tensor, "*shape"], device: torch.device | str) -> Shaped[Tensor, "*shape"]:
    """Returns a tensor on a device; where it comes from the host, without a wait for the device.

    Of pinned memory `to(device, non_blocking=True)` waits for nothing. Of more pageable memory than `TAKEN_AT_ONCE` it
    does, and torch's synchronisation warnings say nothing of it: the driver fills buffers of its own, in the stream's
    order, so that the host stands still until the device has done what was enqueued before. So larger tensors go by
    pinned memory, which torch keeps for the next ones and doesn't give away while a copy reads it.

    Args:
        tensor: Anywhere. Nobody may write to pinned memory that is given before the device has read it.
        device: Where to; the tensor itself is returned if it is there.
    """
    # Towards the host nothing would say when the numbers may be read.
    return _staged(tensor, torch.device(device)).to(device, non_blocking=tensor.device.type == "cpu")


def _staged(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns what is copied to the device: the tensor, or a pinned copy."""
    if device.type != "cuda" or tensor.device.type != "cpu" or tensor.nbytes <= TAKEN_AT_ONCE or tensor.is_pinned():
        return tensor
    return tensor.pin_memory()
