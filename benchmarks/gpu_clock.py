"""Time on a device, by its events; on a CPU by the host's clock."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from kfdist.bench.trainee import counting


def _moment(device: torch.device) -> Any:
    """Notes a moment in the order of the device's work, and waits for nothing."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(before: Any, after: Any) -> float:
    """Returns the milliseconds between two moments; the device must be done."""
    return 1e3 * (after - before) if isinstance(before, float) else before.elapsed_time(after)


class Clock:
    """When each step was done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Notes the end of a step, and waits for nothing."""
        self._marks.append(_moment(self._device))

    def milliseconds(self) -> list[float]:
        """Returns how long each step took; the device must be done."""
        return [_between(*pair) for pair in pairwise(self._marks)]


class Spans:
    """Milliseconds of the device in the calls of some methods; or, as counting takes time, their operations alone.

    Where the host lags behind, a span has the time in which the device waits for the next launch, as a step has it.

    Attributes:
        operations: Of products; counted while `counts`.
        counts: Whether operations are counted, and not time.
    """

    def __init__(self, device: torch.device) -> None:
        self.operations = 0
        self.counts = False
        self._device = device
        self._pairs: list[tuple[Any, Any]] = []

    @contextmanager
    def over(self, owner: type, verb: str) -> Iterator[None]:
        """Spans each call of a class's method, inside the `with`."""
        method = getattr(owner, verb)

        def spanned(*arguments: Any, **named: Any) -> Any:
            if self.counts:
                with counting() as counted:
                    found = method(*arguments, **named)
                self.operations += counted.get_total_flops()
                return found
            before = _moment(self._device)
            found = method(*arguments, **named)
            self._pairs.append((before, _moment(self._device)))
            return found

        setattr(owner, verb, spanned)
        try:
            yield
        finally:
            setattr(owner, verb, method)

    def milliseconds(self) -> float:
        """Returns those of all calls together; the device must be done."""
        return sum(_between(*pair) for pair in self._pairs)
