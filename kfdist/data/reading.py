"""Examples that are read one by one: seeded by (seed, epoch, example), and replaced where they can't be read."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from kfdist.errors import EnvironmentFault
from kfdist.seeds import seed_from

EVALUATION = -1
"""In the place of an epoch: the seeds of evaluations are always the same."""

_TRIES = 100
"""How many neighbours may be unreadable too before a replacement is given up."""


class CorruptExample(Exception):
    """An example can't be read; a data set's `__getitem__` raises it, and another example takes its place.

    Args:
        name: What the user knows the example by, such as its file.
        reason: Why it can't be read.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both, so that it can be pickled
        self.name = name
        self.reason = reason


@runtime_checkable
class Readable(Protocol):
    """A map-style data set, as torch's: `len(data)` examples, and `data[index]` is (input, target).

    Inputs are tensors of one shape; targets are tensors or numbers. `data[index]` depends on the index and on what it
    draws from the global generators of torch, NumPy and Python, which are seeded before each call, and on nothing else:
    then a resumed run, and one with another number of loader processes, sees the same examples. It is pickled once per
    loader process. Raise `CorruptExample` for what can't be read.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, Any]: ...


class Batch(NamedTuple):
    """Examples read for one forward.

    Attributes:
        inputs: [n, ...]; [0] where none of an evaluation's could be read.
        targets: [n, ...].
        corrupt: Why examples that should have been here couldn't be read, by name.
    """

    inputs: Tensor
    targets: Tensor
    corrupt: dict[str, str]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators of torch (the CPU's), NumPy and Python, and puts them back afterwards."""
    former = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(former[0])
        np.random.set_state(former[1])
        torch.set_rng_state(former[2])


@dataclass(frozen=True, kw_only=True)
class SeededReader:
    """Reads batches of a data set; what a loader process runs.

    Attributes:
        data: The data set.
        seed: The run's seed.
    """

    data: Readable
    seed: int

    def __getitems__(self, wanted: tuple[int, Sequence[int]]) -> Batch:
        """Reads the examples of an epoch, or of `EVALUATION`, that have these indices, in this order.

        In training the next readable example takes the place of a corrupt one, so that all ranks keep batches of one
        size; in evaluation it is left out.

        Raises:
            EnvironmentFault: Far too many neighbours are corrupt.
        """
        epoch, indices = wanted
        corrupt: dict[str, str] = {}
        found = [self._read(epoch, index, corrupt) for index in indices]
        examples = [example for example in found if example is not None]
        if not examples:
            nothing = torch.zeros(0, dtype=torch.float32, device="cpu")
            return Batch(nothing, nothing, corrupt)
        inputs, targets = default_collate(examples)
        return Batch(inputs, targets, corrupt)

    def _read(self, epoch: int, index: int, corrupt: dict[str, str]) -> tuple[Tensor, Any] | None:
        count = len(self.data)
        for tried in range(_TRIES):
            try:
                # The replacement has the seed of what it replaces.
                with seeded(seed_from(f"kfdist example {self.seed} {epoch} {index}")):
                    return self.data[(index + tried) % count]
            except CorruptExample as found:
                corrupt[found.name] = found.reason
            if epoch == EVALUATION:
                return None
        raise EnvironmentFault(f"{_TRIES} examples in a row can't be read; the last: {corrupt.popitem()}")
