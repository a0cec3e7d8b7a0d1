"""How long a step takes: as given, as an earlier run measured it, or from its operations and a speed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kfdist.checks import suggestion
from kfdist.config import Config
from kfdist.forecast.earlier_run import EarlierRun
from kfdist.forecast.inversion_costs import Costs
from kfdist.forecast.rehearsal import Rehearsal


@dataclass(frozen=True)
class StepTime:
    """How long a step takes.

    Attributes:
        seconds: How long; None if it isn't known.
        source: Where that is from, or why there is nothing.
        gpu: Whether a GPU does it.
    """

    seconds: float | None
    source: str
    gpu: bool = False


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
) -> list[StepTime]:
    """Returns the step time that is given or was measured; else one by each GPU, or by this machine.

    Args:
        config: What is to run.
        rehearsal: Has the operations of a step.
        costs: Has this CPU's speed.
        given: What the user says.
        earlier: An earlier run.
        gpus: Names of GPUs that ranks might have.
        here: Names of this machine's GPUs, as torch has them, on which ranks would compute.
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
    seconds = rehearsal.flops / costs.flops_per_second
    speed = f"{costs.flops_per_second / 1e9:.0f} GFLOP/s of this CPU with {costs.threads} threads"
    source = f"derived: {_operations(rehearsal.flops)} at {speed}, measured on products of matrices; --gpu says others"
    return [StepTime(seconds, source + _too_short(seconds))]


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
