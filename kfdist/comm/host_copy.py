"""Numbers of the device, read on the host without ever making a step wait for the device."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class HostCopy:
    """Tensors on their way to the host, behind the work that was enqueued before them.

    CUDA tensors go to pinned memory; an event says when they are there. Other tensors are there already and aren't
    copied.

    Args:
        tensors: Of one device, or on the CPU.
        aside: Copies on another stream, so that the compute enqueued next doesn't queue up behind the copy; it must not
            write to the tensors then.
    """

    def __init__(self, tensors: Sequence[Tensor], *, aside: bool = False) -> None:
        self._tensors = list(tensors)
        self._event: torch.cuda.Event | None = None
        device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        if device is None:
            return
        stream = compute = torch.cuda.current_stream(device)
        if aside:
            stream = torch.cuda.Stream(device)
            stream.wait_stream(compute)
        with torch.cuda.stream(stream):
            self._tensors = [_pinned(tensor) if tensor.is_cuda else tensor for tensor in tensors]
            self._event = torch.cuda.Event()
            self._event.record(stream)
        if aside:
            for tensor in tensors:
                if tensor.is_cuda:
                    tensor.record_stream(stream)  # its memory isn't given away before it has been read

    def ready(self) -> bool:
        """Says, without blocking, whether `wait` would return at once."""
        return self._event is None or self._event.query()

    def wait(self) -> list[Tensor]:
        """Returns the tensors, on the CPU and in the order given; waits for the copy alone, not for the device."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


def _pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True, device="cpu").copy_(tensor, non_blocking=True)


class LateTotal:
    """A sum of numbers that live on the device, as of a little earlier: reading them now would wait for it.

    Attributes:
        arrived: Whether any sum has reached the host.
    """

    def __init__(self) -> None:
        self.arrived = False
        self._known = 0.0
        self._copy: HostCopy | None = None

    def latest(self, counts: Iterable[Tensor]) -> float:
        """Returns the newest total that has reached the host, and sends for a newer one; 0 where there are none."""
        self._take_if_ready()
        scalars = [count.double() for count in counts] if self._copy is None else []
        if scalars:
            self._copy = HostCopy([torch.stack(scalars).sum()])
            self._take_if_ready()
        return self._known

    def _take_if_ready(self) -> None:
        if self._copy is not None and self._copy.ready():
            self._known, self._copy, self.arrived = float(self._copy.wait()[0]), None, True
