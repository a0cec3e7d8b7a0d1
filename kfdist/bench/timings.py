"""Times of many steps: their spread, where they were computed, and the rate of this machine's products."""

import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch


def percentile(values: Sequence[float], percent: float) -> float:
    """Returns the least of `values` that at least so many per cent of them don't exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(percent * len(ordered) / 100) - 1, 0)]


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Returns mean, median, p99 and maximum in milliseconds."""
    found = {
        "mean": statistics.fmean(seconds),
        "p50": statistics.median(seconds),
        "p99": percentile(seconds, 99),
        "max": max(seconds),
    }
    return {name: round(1e3 * value, 4) for name, value in found.items()}


def percentiles(seconds: Sequence[float]) -> list[float]:
    """Returns the percentiles from 0 to 100 in milliseconds, which a plot needs and hundreds of steps don't exceed."""
    return [round(1e3 * percentile(seconds, percent), 3) for percent in range(101)]


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the mean of each name in milliseconds, 0 where a row lacks it, the largest first."""
    names = {name for row in rows for name in row}
    found = {name: 1e3 * sum(row.get(name, 0.0) for row in rows) / len(rows) for name in names}
    return {name: round(value, 4) for name, value in sorted(found.items(), key=lambda each: -each[1])}


class Cores:
    """Two disjoint sets of the cores that this process may use: for the thread that trains, and for all the rest.

    On one core both are the same.

    Attributes:
        training: The training's.
        others: The others'.
    """

    def __init__(self) -> None:
        every = sorted(os.sched_getaffinity(0))
        self.training = every[:1]
        self.others = every[1:2] or every


@contextmanager
def running_on(cores: Sequence[int]) -> Iterator[None]:
    """Moves this thread to some cores for the context; threads and processes that it starts there stay on them."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def gemm_rate() -> float:
    """Measures the float32 operations a second of products of 1024 x 1024 matrices on one thread: the best of five."""
    size = 1024
    a, b = torch.randn(size, size), torch.randn(size, size)
    torch.mm(a, b)
    found = []
    for _ in range(5):
        begun = time.thread_time()
        torch.mm(a, b)
        found.append(time.thread_time() - begun)
    return 2 * size**3 / min(found)
