"""CG-FAC's time and peak memory against K-FAC's, by the width of a square layer (docs/papers.md, claim b).

CPU seconds of one thread, float32, p = q = d, Gaussian rows whose scale falls along the columns. K-FAC sums two
factors, inverts them now and then and multiplies with the inverses at every step; CG-FAC keeps the rows and solves at
every step. What would take longer than the limit isn't run.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kfdist.bench.claims import ClaimResult, Part, less_at_every_width
from kfdist.bench.measuring import AllocationCounter, measure_widths, update
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

CONDITIONS = {
    "examples": EXAMPLES,
    "damping": DAMPING,
    "dtype": "float32",
    "factor_period": FACTOR_PERIOD,
    "inverse_period": INVERSE_PERIOD,
    "limit_seconds": LIMIT_SECONDS,
    "cg_settings": CG_SETTINGS,
}

QUANTITIES = {
    "peak_bytes": "peak of allocated bytes",
    "seconds": "seconds of a folding, an inversion and an application together",
    "seconds_per_step": "seconds a step, inversions spread over their period",
}


def measure_cg_claim(quick: bool = False) -> ClaimResult:
    """Measures claim b.

    The rule, fixed before the measurement: shown if CG-FAC, as it comes, has less than K-FAC of each of `QUANTITIES` at
    every width where both were measured. The paper compares one update; the seconds a step are what training pays.

    Args:
        quick: Tiny sizes, which take no time and say nothing.
    """
    rows = measure_cg(QUICK_SIZES if quick else SIZES)
    return ClaimResult(claim="b", title=TITLE, parts=judge_cg(rows), conditions=CONDITIONS, figures={"sizes": rows})


def judge_cg(rows: Sequence[dict[str, Any]]) -> tuple[Part, ...]:
    """Applies the rule of `measure_cg_claim` to the rows of `measure_cg`."""
    both = [row for row in rows if row["kfac"] and row["cg-fac"]]

    def part(quantity: str, words: str) -> Part:
        scale, unit = (2**20, "MiB") if quantity == "peak_bytes" else (1, "s")
        pairs = ((row["d"], row["cg-fac"][quantity] / scale, row["kfac"][quantity] / scale) for row in both)
        return less_at_every_width(f"less {words}", pairs, unit)

    return tuple(part(*each) for each in QUANTITIES.items())


def measure_cg(sizes: Sequence[int] = SIZES, *, limit_seconds: float = LIMIT_SECONDS) -> list[dict[str, Any]]:
    """Measures both methods for every size.

    Args:
        sizes: The widths d.
        limit_seconds: A method isn't run at a size if from its size before, growing like d^3 (K-FAC) or d^2 (CG-FAC),
            it would take longer.

    Returns:
        One row per size with the measurement of each method, or None where not run: seconds of the folding, the
        inversion and one application, all of them, their mean per step, the peak of allocated bytes beside the rows and
        the gradient that were given, and the bytes kept from step to step.
    """
    powers = {"kfac": 3} | dict.fromkeys(CG_SETTINGS, 2)
    return measure_widths(sizes, powers, limit_seconds=limit_seconds, problem=_problem, measure=_measure)


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
        terms=torch.ones(EXAMPLES),
        positions=torch.ones(EXAMPLES),
    )
    return samples, (g.flatten(1, 2).mT @ a.flatten(1, 2)) / EXAMPLES


def _measure(name: str, problem: tuple[Samples, Tensor]) -> dict[str, Any]:
    """Runs folding, inversion and application once for the memory and to warm up, then for the time."""
    samples, gradient = problem
    inverter = make_inverter("kfac") if name == "kfac" else make_inverter("cg-fac", **CG_SETTINGS[name])
    fold = _factors if name == "kfac" else lambda samples: samples
    with AllocationCounter() as counter:
        update(inverter, fold(samples), gradient, DAMPING)
    begun = time.thread_time()
    statistics = fold(samples)
    folded = time.thread_time() - begun
    done = update(inverter, statistics, gradient, DAMPING)
    # K-FAC's moving averages are kept beside its inverses; CG-FAC's rows are copied into its record and then dropped.
    kept = [done.inverse, statistics] if isinstance(statistics, KroneckerFactors) else [done.inverse]
    measured = {
        "seconds_fold": folded,
        "seconds_invert": done.invert,
        "seconds_apply": done.apply,
        "seconds": folded + done.invert + done.apply,
        "seconds_per_step": done.apply + folded / FACTOR_PERIOD + done.invert / INVERSE_PERIOD,
        "peak_bytes": counter.peak_bytes,
        "kept_bytes": sum(tensor.nbytes for record in kept for tensor in tensor_fields(record).values()),
    }
    if not isinstance(done.inverse, ConjugateGradient):
        return measured
    found = done.inverse.solution(gradient, DAMPING)
    return {**measured, "iterations": int(found.iterations.max()), "residual": float(found.residual.max())}


def _factors(samples: Samples) -> KroneckerFactors:
    a, g = samples.a.flatten(1, 2), samples.g.flatten(1, 2)
    return KroneckerFactors(A=a.mT @ a / EXAMPLES, G=g.mT @ g / EXAMPLES)
