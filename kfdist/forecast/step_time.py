"""How long a step takes: as given, as an earlier run measured it, or from its operations and a speed."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from kfdist.checks import suggestion
from kfdist.config import Config
from kfdist.forecast.earlier_run import EarlierRun
from kfdist.forecast.inversion_costs import Costs
from kfdist.forecast.rehearsal import Rehearsal
from kfdist.forecast.trial_steps import Trial


@dataclass(frozen=True)
class StepTime:
    """How long a step takes.

    Attributes:
        seconds: How long; None if it isn't known.
        source: Where that is from, or why there is nothing.
        gpu: Whether a GPU does it.
        alone: Whether a rank of a run on this machine was tried alone, so that the others make its steps longer.
    """

    seconds: float | None
    source: str
    gpu: bool = False
    alone: bool = False

    def beside(self, threads: float) -> "StepTime":
        """Returns it where so many threads want this machine's processors at a time, if it was alone."""
        crowd = threads / (os.cpu_count() or 1)
        if not self.alone or self.seconds is None or crowd <= 1:
            return replace(self, alone=False)
        said = f"{self.source}; times {crowd:.2g}, as {os.cpu_count()} processors have ranks and owners to share"
        return replace(self, seconds=self.seconds * crowd, source=said, alone=False)


@dataclass(frozen=True)
class GpuSpeed:
    """What a GPU's data sheet says, dense, in operations a second.

    Attributes:
        half: In bfloat16 or float16 with tensor cores.
        single: In float32 without them.
    """

    half: float
    single: float


GPUS: Mapping[str, GpuSpeed] = {
    "T4": GpuSpeed(65e12, 8.1e12),
    "V100": GpuSpeed(125e12, 15.7e12),
    "A10": GpuSpeed(125e12, 31.2e12),
    "L4": GpuSpeed(121e12, 30.3e12),
    "L40S": GpuSpeed(362e12, 91.6e12),
    "A100": GpuSpeed(312e12, 19.5e12),
    "H100": GpuSpeed(989e12, 67e12),
    "H200": GpuSpeed(989e12, 67e12),
    "B200": GpuSpeed(2250e12, 80e12),
}
"""NVIDIA's data sheets: V100, A100, H100 and H200 as SXM. None of them was measured here."""

REACHED = 0.35
"""Share of a data sheet's speed that training reaches, as a rule of thumb; a convolutional network may reach less."""

_BOUND_BY_OTHERS = 0.01
"""Seconds below which a step's operations aren't what it takes."""


def step_times(
    config: Config,
    rehearsal: Rehearsal,
    costs: Costs,
    *,
    given: float | None,
    earlier: EarlierRun | None,
    gpus: Sequence[str],
    here: Sequence[str],
    trial: Callable[[float], Trial],
) -> list[StepTime]:
    """Returns the step time that is given or was measured; else one by each GPU, or of this machine's CPU.

    Args:
        config: What is to run.
        rehearsal: Has the operations of a step.
        costs: Has this CPU's speed.
        given: What the user says.
        earlier: An earlier run.
        gpus: Names of GPUs that ranks might have.
        here: Names of this machine's GPUs, as torch has them, on which ranks would compute.
        trial: Makes real steps here, of so many operations, if they are cheap.
    """
    on_gpus = bool(gpus or here)
    if given is not None:
        return [StepTime(given, "as given", on_gpus)]
    if earlier is not None and earlier.step_seconds is not None:
        return [StepTime(earlier.step_seconds, f"measured: the median of {earlier.name}'s steps", on_gpus)]
    if rehearsal.flops is None:
        why = f"a step can't be rehearsed ({rehearsal.fault}); give --step-seconds, or --from-run"
        return [StepTime(None, why)]
    if not gpus and here:
        gpus = [next((name for name in GPUS if name in here[0].replace("-", " ").split()), here[0])]
    if gpus:
        return [_on_gpu(config, rehearsal.flops, name) for name in gpus]
    tried = trial(rehearsal.flops)
    if tried.seconds is not None:
        source = f"measured: {tried.steps} real steps of a rank that is alone here, on {_share_of(config)}"
        return [StepTime(tried.seconds, source, alone=True)]
    seconds = rehearsal.flops / costs.flops_per_second
    source = (
        f"derived: {_operations(rehearsal.flops)} at {costs.flops_per_second / 1e9:.0f} GFLOP/s of this CPU with "
        f"{costs.threads} threads, measured on products of matrices, without kfdist's own work ({tried.why_not}); "
        f"--gpu says others{_too_short(seconds)}"
    )
    return [StepTime(seconds, source)]


def _share_of(config: Config) -> str:
    threads = config.cluster.threads
    return "one thread" if threads == 1 else f"{threads} threads"


def _on_gpu(config: Config, flops: float, name: str) -> StepTime:
    speed = GPUS.get(name.upper())
    if speed is None:
        close = suggestion(name, GPUS)
        return StepTime(None, f"there are no figures for {name!r}{close}; there are for {', '.join(GPUS)}", gpu=True)
    seconds = flops / (REACHED * (speed.single if config.run.precision == "float32" else speed.half))
    return StepTime(
        seconds,
        f"derived for {name.upper()}: {_operations(flops)} at {REACHED:.0%} of its data sheet's speed in "
        f"{config.run.precision}; not measured{_too_short(seconds)}",
        gpu=True,
    )


def _too_short(seconds: float) -> str:
    """Says that a step of few operations takes longer than they do."""
    if seconds >= _BOUND_BY_OTHERS:
        return ""
    return "; launches, input and reductions, which bound so short a step, aren't in it: give --step-seconds"


def _operations(flops: float) -> str:
    return f"{flops / 1e9:,.1f} GFLOP of a rank's step"
