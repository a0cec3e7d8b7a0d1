"""Shows what a step of `AdaptiveStep` costs, in gradients of its batch, and where that goes.

    PYTHONPATH=. python -m benchmarks.adaptive_price [--data FOLDER] [--steps STEPS] [--method METHOD]

A gradient is one forward and backward of the whole batch, by torch alone. Both are timed in turn, in CPU seconds of the
process with one thread, inversions included, wherever they run; medians over the gradients, means over the steps, as
not every step inverts, adapts or searches. The parts are exclusive: what a part calls is counted there, not in it.

Tasks are the digits autoencoder with all 1,438 examples and, given the folder of its files, MNIST's with 2,000.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kfdist
from kfdist.bench.contest_tasks import TASKS, Task
from kfdist.bench.results import table
from kfdist.optim.network_fisher import NetworkFisher
from kfdist.optim.replay import Replay

WARM_UP = 20
PARTS: dict[str, tuple[tuple[type, str], ...]] = {
    "gradient of the batch": ((kfdist.AdaptiveStep, "_measure"),),
    "statistics": ((kfdist.AdaptiveStep, "_measure_statistics"), (kfdist.AdaptiveStep, "_tell")),
    "statistics folded, inverted, adopted": ((kfdist.Preconditioner, "update"),),
    "linearised, products with F": ((NetworkFisher, "products"),),
    "inverses times gradients": ((kfdist.AdaptiveStep, "_direction"),),
    "inner products": ((NetworkFisher, "inner_products"),),
    "the loss afterwards": ((kfdist.AdaptiveStep, "_loss_now"), (kfdist.AdaptiveStep, "_falls")),
    "parameters moved": ((kfdist.AdaptiveStep, "_move"),),
    "the closure's state kept and put back": ((Replay, "__init__"),),
    "the rest": ((kfdist.AdaptiveStep, "step"),),
}


class Clock:
    """CPU seconds by part, each without the parts that it calls."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[float] = []

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a call whose CPU seconds are counted as a part's."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.process_time()
            self._open.append(0.0)
            try:
                return call(*args, **kwargs)
            finally:
                taken = time.process_time() - begun
                self.seconds[part] += taken - self._open.pop()
                if self._open:
                    self._open[-1] += taken

        return timed


@contextmanager
def watched() -> Iterator[Clock]:
    """Times the parts while the context lasts."""
    clock, before = Clock(), []
    for part, calls in PARTS.items():
        for owner, name in calls:
            before.append((owner, name, owner.__dict__[name]))
            setattr(owner, name, clock.timed(part, owner.__dict__[name]))
    try:
        yield clock
    finally:
        for owner, name, call in before:
            setattr(owner, name, call)


def price(task: Task, *, steps: int, method: Any) -> tuple[dict[str, float], float, float]:
    """Returns gradients a step by part, seconds of a gradient, and the loss after all steps."""
    model, batches = task.model(0), task.batches(0)

    def closure(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        outputs = model(inputs)
        return outputs, task.loss(outputs, targets)

    gradients: list[float] = []
    with kfdist.AdaptiveStep.for_model(model, task.loss_name, method=method) as adaptive:
        for _ in range(WARM_UP):
            adaptive.step(closure, *next(batches))
        with watched() as clock:
            for _ in range(steps):
                batch = next(batches)
                adaptive.step(closure, *batch)
                begun = time.process_time()
                with adaptive.preconditioner.paused():
                    torch.autograd.grad(closure(*batch)[1], list(model.parameters()))
                gradients.append(time.process_time() - begun)
    gradient = statistics.median(gradients)
    return {part: clock.seconds[part] / steps / gradient for part in PARTS}, gradient, task.value(model)


def main() -> None:
    """Measures each task and prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of MNIST's files")
    parser.add_argument("--steps", type=int, default=20, help="a multiple of 20, the period of the search for gamma")
    parser.add_argument("--method", default="kfac")
    parser.add_argument("--task", choices=("digits", "MNIST"), help="the only one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    digits = TASKS["digits-autoencoder"]
    tasks = {"digits, 1,438 examples": replace(digits, batch_size=len(digits.examples(test=False)[0]))}
    if options.data is not None:
        tasks["MNIST, 2,000 examples"] = replace(TASKS["mnist-autoencoder"], batch_size=2000, folder=options.data)
    tasks = {name: task for name, task in tasks.items() if name.startswith(options.task or "")}
    found = {name: price(task, steps=options.steps, method=options.method) for name, task in tasks.items()}
    rows = [[part, *(f"{parts[part]:.2f}" for parts, _, _ in found.values())] for part in PARTS]
    rows.append(["a step, in gradients", *(f"{sum(parts.values()):.2f}" for parts, _, _ in found.values())])
    rows.append(["a gradient, ms", *(f"{1000 * gradient:.1f}" for _, gradient, _ in found.values())])
    rows.append(["loss at the end", *(f"{loss:.5f}" for _, _, loss in found.values())])
    print(table(["", *found], rows))


if __name__ == "__main__":
    main()
