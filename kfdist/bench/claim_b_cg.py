"""CG-FAC's time and peak memory against K-FAC's, by the width of a square layer (docs/papers.md, claim b).

CPU seconds of one thread, float32, p = q = d, Gaussian rows whose scale falls along the columns. K-FAC sums two
factors, inverts them now and then and multiplies with the inverses at every step; CG-FAC keeps the rows and solves at
every step. What would take longer than the limit isn't run: its result is None, never an extrapolation.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kfdist.bench.claims import ClaimResult, Part, all_of
from kfdist.bench.measuring import AllocationCounter
from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.curvature.inverter import AbstractInverter
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.inverters.cg_fac import ConjugateGradient
from kfdist.curvature.statistics import KroneckerFactors, Samples
from kfdist.wire.records import tensor_fields

TITLE = "CG-FAC takes less time and less memory than K-FAC, for widths from 256 to 8192 (2101.00218)"
SIZES = (256, 512, 1024, 2048, 4096, 8192)
QUICK_SIZES = (16, 32)
EXAMPLES = 256
DAMPING = 1e-2
LIMIT_SECONDS = 20.0
FACTOR_PERIOD, INVERSE_PERIOD = 10, 100
"""kfdist's defaults: the steps over which the costs of a folding and of an inversion are spread."""

CG_SETTINGS: dict[str, dict[str, Any]] = {
    "cg-fac": {},
    "cg-fac, always ten iterations": {"tolerance": 1e-9, "max_iterations": 10},
}
"""As it comes; and never stopped early, which is the most it can cost."""

Measurement = dict[str, Any]


QUANTITIES = {
    "peak_bytes": "peak of allocated bytes",
    "seconds_all": "seconds of a folding, an inversion and an application together",
    "seconds_per_step": "seconds a step, inversions spread over their period",
}


def measure_cg_claim(quick: bool = False) -> ClaimResult:
    """Measures claim b.

    The rule, fixed before the measurement: shown if CG-FAC, as it comes, has less than K-FAC of each of `QUANTITIES` at
    every width where both were measured. The paper compares one update; the seconds a step are what training pays.

    Args:
        quick: Tiny sizes, which take no time and say nothing.
    """
    measured = measure_cg(QUICK_SIZES if quick else SIZES)
    rows = measured.pop("sizes")
    return ClaimResult(claim="b", title=TITLE, parts=judge_cg(rows), figures={"sizes": rows}, conditions=measured)


def judge_cg(rows: Sequence[dict[str, Any]]) -> tuple[Part, ...]:
    """Applies the rule of `measure_cg_claim` to the rows of `measure_cg`."""
    both = [row for row in rows if row["kfac"] and row["cg-fac"]]
    parts: list[Part] = []
    for quantity, words in QUANTITIES.items():
        unit, shown = (2**20, "MiB") if quantity == "peak_bytes" else (1, "s")
        pairs = [(row["d"], row["cg-fac"][quantity] / unit, row["kfac"][quantity] / unit) for row in both]
        seen = ", ".join(f"d = {d}: {cg:.3g} {shown}, not {kfac:.3g}" for d, cg, kfac in pairs)
        holds = all_of([cg < kfac for _, cg, kfac in pairs])
        parts.append(Part(statement=f"less {words}", holds=holds, seen=seen or "not measured"))
    return tuple(parts)


def measure_cg(sizes: Sequence[int] = SIZES, *, limit_seconds: float = LIMIT_SECONDS) -> dict[str, Any]:
    """Measures both methods for every size.

    Args:
        sizes: The widths d.
        limit_seconds: A method isn't run at a size if from its size before, growing like d^3 (K-FAC) or d^2 (CG-FAC),
            it would take longer.

    Returns:
        What was fixed, and one row per size with the measurement of each method, or None where not run: seconds of the
        folding, the inversion and one application, their mean per step, the peak of allocated bytes beside the rows
        and the gradient that were given, and the bytes kept from step to step.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    try:
        for d in sorted(sizes):
            samples, gradient = _problem(d)
            row: dict[str, Any] = {"d": d, "kfac": None} | dict.fromkeys(CG_SETTINGS)
            if _affordable("kfac", d, rows, power=3, limit=limit_seconds):
                row["kfac"] = _measure_kfac(samples, gradient)
            for name, settings in CG_SETTINGS.items():
                if _affordable(name, d, rows, power=2, limit=limit_seconds):
                    row[name] = _measure_cg(samples, gradient, settings)
            rows.append(row)
    finally:
        torch.set_num_threads(threads)
    return {
        "examples": EXAMPLES,
        "damping": DAMPING,
        "dtype": "float32",
        "threads": 1,
        "factor_period": FACTOR_PERIOD,
        "inverse_period": INVERSE_PERIOD,
        "limit_seconds": limit_seconds,
        "cg_settings": CG_SETTINGS,
        "sizes": rows,
    }


def _problem(d: int) -> tuple[Samples, Tensor]:
    generator = torch.Generator().manual_seed(d)
    fall = torch.linspace(2.0, 0.1, d)
    a = torch.randn(1, EXAMPLES, 1, d, generator=generator) * fall
    g = torch.randn(1, EXAMPLES, 1, d, generator=generator) * fall
    samples = Samples(
        a=a,
        g=g,
        weight=torch.ones(EXAMPLES),
        source=torch.zeros(EXAMPLES, dtype=torch.int64),
        positions=torch.tensor(1.0),
    )
    return samples, (g.flatten(1, 2).mT @ a.flatten(1, 2)) / EXAMPLES


def _affordable(name: str, d: int, rows: list[dict[str, Any]], *, power: int, limit: float) -> bool:
    if not rows:
        return True
    last = rows[-1]
    return last[name] is not None and last[name]["seconds_all"] * (d / last["d"]) ** power <= limit


def _measure_kfac(samples: Samples, gradient: Tensor) -> Measurement:
    def fold() -> KroneckerFactors:
        a, g = samples.a.flatten(1, 2), samples.g.flatten(1, 2)
        return KroneckerFactors(A=a.mT @ a / EXAMPLES, G=g.mT @ g / EXAMPLES)

    return _measure(make_inverter("kfac"), fold, gradient)[0]


def _measure_cg(samples: Samples, gradient: Tensor, settings: dict[str, Any]) -> Measurement:
    measured, made = _measure(make_inverter("cg-fac", **settings), lambda: samples, gradient)
    assert isinstance(made, ConjugateGradient)
    found = made.solution(gradient, DAMPING)
    return {**measured, "iterations": int(found.iterations.max()), "residual": float(found.residual.max())}


def _measure(
    inverter: AbstractInverter, fold: Callable[[], Any], gradient: Tensor
) -> tuple[Measurement, AbstractPreconditioner]:
    """Runs folding, inversion and application once for the memory and to warm up, then for the time."""
    with AllocationCounter() as counter:
        _run(inverter, fold, gradient)
    seconds, statistics, made = _run(inverter, fold, gradient)
    # K-FAC's moving averages are kept beside its inverses; CG-FAC's rows are copied into its record and then dropped.
    kept = [made, statistics] if isinstance(statistics, KroneckerFactors) else [made]
    per_step = seconds["apply"] + seconds["fold"] / FACTOR_PERIOD + seconds["invert"] / INVERSE_PERIOD
    measured = {f"seconds_{part}": seconds[part] for part in seconds}
    return {
        **measured,
        "seconds_all": sum(seconds.values()),
        "seconds_per_step": per_step,
        "peak_bytes": counter.peak_bytes,
        "kept_bytes": sum(tensor.nbytes for record in kept for tensor in tensor_fields(record).values()),
    }, made


def _run(
    inverter: AbstractInverter, fold: Callable[[], Any], gradient: Tensor
) -> tuple[dict[str, float], Any, AbstractPreconditioner]:
    # One thread's CPU time: what else the machine does hardly matters.
    begun = time.process_time()
    statistics = fold()
    folded = time.process_time()
    made = inverter.invert(statistics, damping=DAMPING, previous={}, seed=0).preconditioner
    inverted = time.process_time()
    if made is None:
        raise RuntimeError(f"{inverter.name} could not invert the benchmark's rows; see kfdist.bench.claim_b_cg")
    made.apply(gradient, DAMPING)
    applied = time.process_time()
    return {"fold": folded - begun, "invert": inverted - folded, "apply": applied - inverted}, statistics, made
