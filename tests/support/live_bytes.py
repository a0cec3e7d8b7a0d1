"""How many bytes of tensors exist at most while something runs, counted exactly, operation by operation."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # pyright: ignore[reportPrivateImportUsage]
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make under it, from the operation to the storage's end.

    Storages that come in from outside aren't counted, nor what a library takes for itself within one operation.

    Attributes:
        live: Bytes that exist.
        peak: Most bytes that existed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._known.update(_storages((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._end, storage.nbytes())
        return result

    def _end(self, size: int) -> None:
        self.live -= size


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for value in tree_leaves(values):
        if isinstance(value, Tensor):
            yield value.untyped_storage()


def peak_of(action: Callable[[], object]) -> int:
    """Runs an action and returns the most bytes of tensors that it had at a time, beside those it was given."""
    with LiveBytes() as meter:
        action()
    return meter.peak
