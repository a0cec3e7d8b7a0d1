"""What all measurements share: memory by what operations allocate, and the machine that the figures belong to."""

import os
import platform
import weakref
from typing import Any

import torch
from torch import Tensor

from kfdist.system.provenance import processor_field
from kfdist.torch_internals import TorchDispatchMode, storage_id, tree_leaves


def hardware() -> dict[str, Any]:
    """Returns what the times depend on: the processor, its cores and the threads that torch may use."""
    return {
        "machine": platform.machine(),
        "cpu": processor_field("model name") or platform.processor(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def load_average() -> float:
    """Returns how many processes wanted a core during the last minute, this one among them."""
    return round(os.getloadavg()[0], 2)


class AllocationCounter(TorchDispatchMode):
    """Watches the operations inside a `with` block.

    Work space inside an operation (of LAPACK, for instance) isn't seen; what the operations return is.

    Attributes:
        live_bytes: Allocated inside the block and still in use.
        peak_bytes: The most of it at any time.
        shapes: Shape of everything that an operation returned in newly allocated memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self.shapes: set[tuple[int, ...]] = set()
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and takes note of what it returned."""
        del types
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and self._watch(tensor.untyped_storage()):
                self._count(tensor.untyped_storage())
                self.shapes.add(tuple(tensor.shape))
        return result

    def _watch(self, storage: torch.UntypedStorage) -> bool:
        """Remembers a storage for as long as it lives; returns whether it is new."""
        key = storage_id(storage)
        if key in self._known:
            return False
        self._known.add(key)
        weakref.finalize(storage, self._known.discard, key)
        return True

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live_bytes -= size
