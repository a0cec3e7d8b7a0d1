"""How fast a card multiplies, and at which share of that kfdist's statistics and its application run."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch

from benchmarks.gpu_clock import Clock, Spans
from benchmarks.gpu_tasks import Task
from kfdist.capture.collect import Collector
from kfdist.linalg.arithmetic import fast_products
from kfdist.runtime.apply.applications import Applying
from kfdist.runtime.reduce.reducer import StatisticsReducer

PARTS: Mapping[str, Sequence[tuple[type, str]]] = {
    "statistics": ((Collector, "add"), (StatisticsReducer, "fold")),
    "application": ((Applying, "apply"),),
}
"""Where kfdist multiplies on the device. Rows are drawn in the backward, and multiplied there or when they are folded
in."""

_SIZE, _REPETITIONS = 8192, 10


def product_rates(device: torch.device, *, size: int = _SIZE) -> dict[str, float]:
    """Measures the TFLOP/s of a product of square matrices: of bfloat16, of float32 by TF32, and of float32 as it is.

    Args:
        device: Where.
        size: Rows and columns.
    """
    found = {}
    for name, dtype, rounded in (
        ("bf16", torch.bfloat16, nullcontext()),
        ("tf32", torch.float32, fast_products(device)),
        ("float32", torch.float32, nullcontext()),
    ):
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        product, clock = torch.empty_like(left), Clock(device)
        with rounded:
            torch.mm(left, right, out=product)
            clock.mark()
            for _ in range(_REPETITIONS):
                torch.mm(left, right, out=product)
                clock.mark()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found[name] = _short(2 * size**3 / (1e9 * statistics.median(clock.milliseconds())))
    return found


def part_rates(task: Task, step: Callable[[], object], *, period: int) -> dict[str, dict[str, Any]]:
    """Measures how long kfdist's parts take on the device and, at further steps, how many operations they have.

    Args:
        task: What is trained.
        step: Trains a step behind a preconditioner.
        period: Its factor period: in as many steps each block is measured once.

    Returns:
        Of each part milliseconds and GFLOP a step in the mean over a period, and TFLOP/s; those are missing of a part
        that multiplied nothing.
    """
    spans = {name: Spans(task.device) for name in PARTS}
    with ExitStack() as stack:
        for name, verbs in PARTS.items():
            for owner, verb in verbs:
                stack.enter_context(spans[name].over(owner, verb))
        for _ in range(period):
            step()
        task.finish()
        for each in spans.values():
            each.counts = True
        for _ in range(period):
            step()
        task.finish()
    found: dict[str, dict[str, Any]] = {}
    for name, each in spans.items():
        took = each.milliseconds()
        found[name] = {"ms_a_step": _short(took / period), "gflop_a_step": _short(each.operations / 1e9 / period)}
        if took and each.operations:
            found[name]["tflops"] = _short(each.operations / (1e9 * took))
    return found


def shares(parts: Mapping[str, Mapping[str, Any]], products: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Returns at which share of the card's own rates parts run.

    Args:
        parts: From `part_rates`.
        products: From `product_rates`.
    """
    return {
        name: {form: _short(each["tflops"] / rate) for form, rate in products.items()}
        for name, each in parts.items()
        if "tflops" in each
    }


def _short(number: float) -> float:
    return float(f"{number:.4g}")
