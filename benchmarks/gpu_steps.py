"""How long steps take on a device, and how much memory: with first-order optimizers alone, and with kfdist."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kfdist
from benchmarks.gpu_clock import Clock
from benchmarks.gpu_rates import part_rates
from benchmarks.gpu_tasks import Task
from kfdist.bench.served import served
from kfdist.bench.timings import percentile
from kfdist.config import load_config
from kfdist.links.link import AbstractLink
from kfdist.links.local import LocalLink
from kfdist.training.method import plan_of

RECIPE = "imagenet-resnet50"
FACTOR_PERIOD, INVERSE_PERIOD = 10, 100
"""kfdist's defaults, and the recipe's."""

MEAN_GOAL, P99_GOAL = 1.05, 1.10
"""Of what a first-order optimizer's step takes."""

_WARM = 5

Stepping = tuple[torch.optim.Optimizer, kfdist.Preconditioner | None]
"""What steps a model, and the preconditioner that works in its steps."""

Link = kfdist.Service | AbstractLink
Linking = Callable[[], AbstractContextManager[Link]]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to step a model.

    Attributes:
        name: Of it.
        trained: Makes what steps a model, until the end of the `with`.
        beside: The variant that it is compared with; empty for that one.
        weight: Its part of the time, by the sum of all variants' weights.
    """

    name: str
    trained: Callable[[nn.Module], AbstractContextManager[Stepping]]
    beside: str = ""
    weight: int = 1


def _sgd_of(task: Task, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=task.training.sgd_lr, momentum=0.9, weight_decay=5e-5)


def by_sgd(task: Task) -> Variant:
    """SGD alone."""

    @contextmanager
    def trained(model: nn.Module) -> Iterator[Stepping]:
        yield _sgd_of(task, model), None

    return Variant(name="sgd", trained=trained)


def by_adamw(task: Task) -> Variant:
    """AdamW alone, in torch's fastest form."""

    @contextmanager
    def trained(model: nn.Module) -> Iterator[Stepping]:
        yield torch.optim.AdamW(model.parameters(), lr=task.training.adamw_lr, fused=True), None

    return Variant(name="adamw", trained=trained)


def behind(
    task: Task, name: str, linking: Linking, make: Callable[[nn.Module, Link], kfdist.Preconditioner]
) -> Variant:
    """SGD behind a preconditioner, inverses by somebody."""

    @contextmanager
    def trained(model: nn.Module) -> Iterator[Stepping]:
        # It ends its processes where a step fails, too.
        with linking() as link, make(model, link) as preconditioner:
            optimizer = _sgd_of(task, model)
            preconditioner.attach(optimizer)
            yield optimizer, preconditioner

    return Variant(name=name, trained=trained, beside="sgd", weight=3)


def by_default(task: Task) -> Variant:
    """`kfdist.Optimizer` as it is, at AdamW's learning rate; bases by threads of this process, on the CPU."""

    @contextmanager
    def trained(model: nn.Module) -> Iterator[Stepping]:
        with kfdist.Optimizer(model, lr=task.training.adamw_lr) as optimizer:
            yield optimizer, optimizer.preconditioner

    return Variant(name="kfdist.Optimizer", trained=trained, beside="adamw", weight=3)


def variants_of(part: str, task: Task, *, threads: int, tiny: bool) -> list[Variant]:
    """Returns how a model is stepped: what everything is compared with comes first.

    ResNet-50 is trained as its recipe has it, with SGD and behind `rs-kfac`. Transformers are trained with AdamW as a
    rule, so there is `kfdist.Optimizer` beside it, and `rs-kfac` beside SGD as well.

    Args:
        part: Name of the model.
        task: It.
        threads: Of an owner's inversions.
        tiny: Whether a thread inverts in the place of owners, whose start would take most of the time.
    """

    def owner(device: str) -> Linking:
        return (lambda: nullcontext(LocalLink())) if tiny else (lambda: _owned(device, threads))

    def by_recipe(model: nn.Module, link: Link) -> kfdist.Preconditioner:
        plan = plan_of(load_config(Path(RECIPE), environment={}), model, world_size=1, costs=None)
        return kfdist.Preconditioner.from_plan(plan, link=link)

    def by_defaults(model: nn.Module, link: Link) -> kfdist.Preconditioner:
        return kfdist.Preconditioner(model, "rs-kfac", skip=task.training.skip, link=link)

    if part == "resnet50":
        devices = dict.fromkeys(("cpu", task.device.type))
        return [by_sgd(task), *(behind(task, f"rs-kfac, owner on {on}", owner(on), by_recipe) for on in devices)]
    return [by_adamw(task), by_default(task), by_sgd(task), behind(task, "rs-kfac", owner("cpu"), by_defaults)]


@contextmanager
def _owned(device: str, threads: int) -> Iterator[Link]:
    with served(threads=threads, device=device) as running:
        yield running.service


def steps(task: Task, variant: Variant, seconds: float) -> dict[str, Any]:
    """Trains for some seconds and returns how long steps took, the most memory and, of kfdist, what its parts took."""
    if task.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = task.make()
    with variant.trained(model) as (optimizer, preconditioner):

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            loss = task.backward(model)
            optimizer.step()
            return loss

        found = timed(task, seconds, step)
        if preconditioner is not None:
            found |= _said(preconditioner)
            found["parts"] = part_rates(task, step, period=FACTOR_PERIOD)
        found["loss"] = round(float(step()), 4)
    return found


def timed(task: Task, seconds: float, step: Callable[[], object]) -> dict[str, Any]:
    """Makes steps for some seconds; returns how long they took, and the most memory."""
    begun = time.perf_counter()
    step()  # with kfdist, this waits for the first inverses
    task.finish()
    first = time.perf_counter() - begun
    for _ in range(_WARM):
        step()
    clock, ends, host = Clock(task.device), time.perf_counter() + seconds, []
    clock.mark()
    while not host or time.perf_counter() < ends:
        before = time.perf_counter()
        step()
        clock.mark()
        host.append(1e3 * (time.perf_counter() - before))
        if len(host) % 20 == 0:
            task.finish()  # else the host would be far ahead when the time is over
    task.finish()
    took = clock.milliseconds()
    found: dict[str, Any] = {
        "steps": len(took),
        "first_step_seconds": round(first, 3),
        "mean_ms": round(statistics.fmean(took), 3),
        "p50_ms": round(statistics.median(took), 3),
        "p99_ms": round(percentile(took, 99), 3),
        "max_ms": round(max(took), 3),
        "host_p50_ms": round(statistics.median(host), 3),
        "examples_per_second": round(1e3 * task.training.examples / statistics.fmean(took), 1),
    }
    if task.device.type == "cuda":
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return found


def _said(preconditioner: kfdist.Preconditioner) -> dict[str, Any]:
    """Returns what a preconditioner says of the steps so far."""
    coverage, diagnostics = preconditioner.coverage(), preconditioner.diagnostics().values()
    ranks = {
        name: [each[name] for each in diagnostics if name in each] for name in ("rank_A", "rank_G", "direction_error")
    }
    return {
        "blocks": len(preconditioner.staleness()),
        "share_preconditioned": round(coverage.share, 4),
        "adoptions": preconditioner.counters()["adoptions"],
        "largest_staleness": max(preconditioner.staleness().values()),
        "means_of_blocks": {name: round(statistics.fmean(each), 3) for name, each in ranks.items() if each},
    }


def compared(variants: Sequence[Variant], measured: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns what kfdist's steps take beside those of what each is compared with, as far as both were measured.

    Args:
        variants: All of a model.
        measured: By name, from `steps`.
    """
    found = {}
    for each in variants:
        ours, theirs = measured.get(each.name, {}), measured.get(each.beside, {})
        if "mean_ms" not in ours or "mean_ms" not in theirs:
            continue
        mean, p50, p99 = (round(ours[key] / theirs[key], 4) for key in ("mean_ms", "p50_ms", "p99_ms"))
        found[each.name] = {
            "beside": each.beside,
            "mean_ratio": mean,
            "p50_ratio": p50,
            "p99_ratio": p99,
            "mean_within_5_percent": mean <= MEAN_GOAL,
            "p99_within_10_percent": p99 <= P99_GOAL,
        }
        if "peak_gb" in ours and "peak_gb" in theirs:
            found[each.name]["more_gb"] = round(ours["peak_gb"] - theirs["peak_gb"], 3)
    return found
