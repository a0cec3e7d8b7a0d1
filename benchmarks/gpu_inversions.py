"""How long inversions of a model's factors take by each method, and how many training GPUs one owner is enough for."""

import time
from typing import Any

import kfdist
from benchmarks.gpu_tasks import Task
from kfdist.curvature.blocks import LayerBlock
from kfdist.errors import ConfigError
from kfdist.links.local import LocalLink
from kfdist.types import JobResult

MOST_STALENESS, LONGEST_PERIOD = 100, 90
"""An inverse gets as old as its inverse period and what goes by until the next one is adopted. Of whole factor periods
of 10 steps the period is 90 at most then, which leaves ten steps for the agreement and for waiting in the queue."""

_EXAMPLES = 32
"""Of a batch: a factor's size is the layer's, whatever is measured."""


class Recording(LocalLink):
    """A local link that keeps how long inversions took."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.seconds: list[float] = []

    def poll(self) -> list[JobResult]:
        """Returns the finished inversions, and notes their seconds."""
        results = super().poll()
        self.seconds += [result.seconds for result in results]
        return results


def inversions(task: Task, method: str, device: str) -> dict[str, Any]:
    """Inverts a model's factors twice with a method; returns how long the second time took.

    Args:
        task: What is trained.
        method: A key of `INVERTERS`.
        device: Where to invert.
    """
    model, link = task.make(), Recording(device)
    settings = {"factor_period": 1, "inverse_period": 1, "lr": 0.0, "adoption": kfdist.FixedLag(0), "link": link}
    try:
        pre = kfdist.Preconditioner(model, method, **settings)
    except ConfigError as error:
        return {"refused": str(error)}
    whole = 0.0
    with pre:
        for _ in range(2):
            link.seconds.clear()
            model.zero_grad()
            task.backward(model, _EXAMPLES)
            task.finish()
            begun = time.perf_counter()
            pre.step()
            task.finish()
            whole = time.perf_counter() - begun
        shipped = [block for group in pre.groups if not group.own for block in group.blocks]
    return {
        "jobs": len(link.seconds),
        "factors": 2 * sum(isinstance(block, LayerBlock) for block in shipped),
        "seconds": round(sum(link.seconds), 4),
        "largest_seconds": round(max(link.seconds, default=0.0), 4),
        "step_seconds": round(whole, 4),
    }


def served_gpus(seconds: float, step_ms: float) -> dict[str, Any]:
    """Returns how many training GPUs an owner is enough for, at a staleness of `MOST_STALENESS` steps at most.

    All GPUs of one run have the same inverses: at a step's time of its own, a run may have any number. What counts is
    how many steps of one GPU go by while its owner inverts everything once. So many runs of one GPU each one owner can
    serve; or so many GPUs of one run, where they divide the same batch, and a step takes a share of the time.

    Args:
        seconds: Of all inversions, one after another.
        step_ms: A step's time on one GPU.
    """
    return {
        "gpus_of_one_owner": int(LONGEST_PERIOD * step_ms / (1e3 * seconds)),
        "shortest_step_ms": round(1e3 * seconds / LONGEST_PERIOD, 3),
    }
