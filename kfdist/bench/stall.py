"""`kfdist bench stall`: whether steps take longer while owners are slow, and what the thread that trains does for them.

In some segments the owner's processes are stopped nine tenths of the time; they take turns with undisturbed ones.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from multiprocessing.synchronize import Event
from typing import Any

from kfdist import checks
from kfdist.bench.plots import draw_step_times
from kfdist.bench.results import conditions, table
from kfdist.bench.served import served
from kfdist.bench.timings import Cores, percentiles, running_on, spread
from kfdist.bench.trainee import Trainee
from kfdist.bench.training_thread import KINDS, profile_steps
from kfdist.bench.workloads import WORKLOADS
from kfdist.report.drawing import drawing
from kfdist.runtime.preconditioner import Preconditioner
from kfdist.system.processes import children_of

_PERIOD_SECONDS = 0.05
_WARM = 20


@dataclass(frozen=True, kw_only=True)
class StallSettings:
    """What is measured.

    Attributes:
        model: A key of `WORKLOADS`.
        method: The preconditioner's; everything else is its default.
        steps: Timed steps with and without the disturbance.
        segment: Steps before it begins or ends.
        slowdown: How many times slower owners are.
    """

    model: str = "resnet18"
    method: str = "rs-kfac"
    steps: int = 300
    segment: int = 50
    slowdown: int = 10

    def __post_init__(self) -> None:
        checks.choice("--model", self.model, WORKLOADS)
        checks.count("--steps", self.steps, least=1)
        checks.count("--slowdown", self.slowdown, least=2)


class Throttle:
    """Slows processes down: a process of its own stops them, and lets them go on for a part of the time.

    Args:
        pids: The processes.
        slowdown: They run one part in so many.
    """

    def __init__(self, pids: Iterable[int], slowdown: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._active, self._ended = context.Event(), context.Event()
        self._process = context.Process(
            target=_throttle, args=(sorted(pids), slowdown, self._active, self._ended), daemon=True
        )
        self._process.start()

    @contextmanager
    def slowed(self) -> Iterator[None]:
        """Slows them down during the context."""
        self._active.set()
        try:
            yield
        finally:
            self._active.clear()

    def close(self) -> None:
        """Lets them go on for good."""
        self._ended.set()
        self._process.join()


def _throttle(pids: list[int], slowdown: int, active: Event, ended: Event) -> None:
    parent = os.getppid()
    try:
        while not ended.is_set() and os.getppid() == parent:
            if not active.is_set():
                time.sleep(_PERIOD_SECONDS / 10)
                continue
            _signal(pids, signal.SIGSTOP)
            time.sleep(_PERIOD_SECONDS * (slowdown - 1) / slowdown)
            _signal(pids, signal.SIGCONT)
            time.sleep(_PERIOD_SECONDS / slowdown)
    finally:
        _signal(pids, signal.SIGCONT)


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def measure_stall(settings: StallSettings) -> dict[str, Any]:
    """Trains under owners that are slow by turns, and returns what steps took; then profiles the training thread.

    Raises:
        ConfigError: The method doesn't exist or doesn't take the model.
        EnvironmentFault: The service doesn't start.
    """
    workload, cores = WORKLOADS[settings.model], Cores()
    with running_on(cores.others), served() as running:
        trainee = Trainee(
            workload, lambda model: Preconditioner(model, settings.method, lr=workload.lr, link=running.service), 0
        )
        preconditioner = trainee.preconditioner
        assert preconditioner is not None
        with running_on(cores.training), preconditioner:
            for _ in range(_WARM):
                trainee.step()
            with running_on(cores.others):
                pids = {pid for owner in running.owners for pid in (owner, *children_of(owner))}
                throttle = Throttle(pids, settings.slowdown)
            try:
                totals, staleness, received = _by_turns(trainee, preconditioner, throttle, settings)
            finally:
                throttle.close()
            handled = profile_steps(trainee, preconditioner, steps=preconditioner.settings.inverse_period_at(0))
    spreads = {name: spread(seconds) for name, seconds in totals.items()}
    return {
        "bench": "stall",
        "config": {
            **asdict(settings),
            "workload": workload.title,
            "adoption": "asap",
            "owners": 1,
            "cores": {"training": cores.training, "owners": cores.others},
        },
        **{
            f"{name}_ratio": round(spreads["slowed"][name] / spreads["unslowed"][name], 4)
            for name in ("mean", "p50", "p99")
        },
        "by_speed": {
            name: {
                **spreads[name],
                "percentiles": percentiles(seconds),
                "largest_staleness": staleness[name],
                "result_bytes_a_step": round(received[name] / len(seconds)),
            }
            for name, seconds in totals.items()
        },
        "training_thread": {
            "steps": handled.steps,
            "job_bytes": handled.jobs_bytes,
            "copied_bytes": handled.copied,
            "copied_over_job_bytes": round(handled.copied / max(handled.jobs_bytes, 1), 3),
            "calls": {kind: handled.calls[kind] for kind in KINDS},
            "milliseconds_a_step": {kind: round(1e3 * handled.seconds[kind] / handled.steps, 4) for kind in KINDS},
        },
    }


def _by_turns(
    trainee: Trainee, preconditioner: Preconditioner, throttle: Throttle, settings: StallSettings
) -> tuple[dict[str, list[float]], dict[str, int], dict[str, int]]:
    """Returns the seconds of steps, the largest staleness and the bytes of results, with the owner "slowed" and not."""
    totals: dict[str, list[float]] = {"unslowed": [], "slowed": []}
    staleness, received = dict.fromkeys(totals, 0), dict.fromkeys(totals, 0)
    while len(totals["slowed"]) < settings.steps:
        for name, seconds in totals.items():
            before = preconditioner.pipeline.inverting.bytes_received
            with throttle.slowed() if name == "slowed" else nullcontext():
                for _ in range(min(settings.segment, settings.steps - len(seconds))):
                    seconds.append(trainee.step().total)
                    staleness[name] = max(staleness[name], *preconditioner.staleness().values())
            received[name] += preconditioner.pipeline.inverting.bytes_received - before
    return totals, staleness, received


def describe(content: Mapping[str, Any]) -> str:
    """Puts a measurement into words and tables."""
    config, thread = content["config"], content["training_thread"]
    speeds = [
        [name, *(each[key] for key in ("mean", "p50", "p99", "max", "largest_staleness", "result_bytes_a_step"))]
        for name, each in content["by_speed"].items()
    ]
    did = [[kind, thread["calls"][kind], each] for kind, each in thread["milliseconds_a_step"].items()]
    return "\n".join(
        [
            f"{config['workload']}; {config['method']}, asap; an owner slowed {config['slowdown']} times in every "
            f"other segment; {config['steps']} steps each",
            "",
            table(["ms a step, owner", "mean", "p50", "p99", "max", "staleness", "result bytes a step"], speeds),
            f"slowed / unslowed: mean {content['mean_ratio']:.3f}, p50 {content['p50_ratio']:.3f}, "
            f"p99 {content['p99_ratio']:.3f}",
            "",
            table([f"the training thread, {thread['steps']} steps", "calls", "ms a step"], did),
            f"it copied {thread['copied_bytes'] / 1e6:.1f} MB to hand over {thread['job_bytes'] / 1e6:.1f} MB of jobs: "
            f"{thread['copied_over_job_bytes']:.2f} times",
            conditions(content),
        ]
    )


def plot(content: Mapping[str, Any]) -> str:
    """Draws which share of the steps takes how long, with owners at full speed and slowed."""
    with drawing(2.9) as drawn:
        by_speed = content["by_speed"].items()
        draw_step_times(drawn.axes[0], {f"owner {name}": each["percentiles"] for name, each in by_speed})
    return drawn.svg
