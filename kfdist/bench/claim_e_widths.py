"""One update of RS-KFAC against K-FAC's, by the width of a square layer (arXiv 2206.15397; docs/papers.md, claim e).

An update is the inversion of both d x d factors and one application, as when a block is inverted; sums of outer
products, alike for all, aren't in it. CPU seconds of one thread, float32. The factors' eigenvalues fall as 1/k^2, which
is milder than what training shows (algorithms.md 3.1), and are dense: rotated by random reflections.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kfdist.bench.claims import ClaimResult, Part, less_at_every_width
from kfdist.bench.measuring import Update, measure_widths, update
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.statistics import KroneckerFactors

TITLE = "RS-KFAC's update is cheaper than K-FAC's in wide layers, and grows as d^2, not d^3 (2206.15397)"
WIDE = 1024
EXPONENT_LIMIT = 2.5

METHODS: dict[str, dict[str, Any]] = {
    "kfac": {},
    "kfac-eigen": {"damping_rule": "pi"},
    "rs-kfac": {},
}
"""Cholesky; eigendecompositions; sketches of the published rank."""

DAMPING = 1e-4
REFLECTIONS = 4
TARGET_SECONDS, MOST_REPETITIONS = 3.0, 5


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of the experiment.

    Attributes:
        sizes: d, rising.
        limit_seconds: A method isn't run at a size if from its size before, growing as d^3, it would take longer.
        rank: Of rs-kfac.
        wide: d from which on RS-KFAC is to be cheaper.
    """

    sizes: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    limit_seconds: float = 30.0
    rank: int = 220
    wide: int = WIDE


QUICK = Settings(sizes=(32, 64), rank=8, wide=64)


def measure_width_claim(quick: bool = False) -> ClaimResult:
    """Measures claim e.

    The rule: shown if at every d >= 1024 where both were measured, an update of RS-KFAC takes fewer seconds than one of
    K-FAC by eigendecomposition, which is the K-FAC that the paper counts, and the exponent of its seconds from d = 1024
    up is at most 2.5, where that of the eigendecompositions is more. Cholesky, which the paper doesn't count and the
    first form of this rule did, is measured beside them.

    Args:
        quick: Tiny sizes, which take no time and say nothing.
    """
    settings = QUICK if quick else Settings()
    rows = measure_widths(
        settings.sizes,
        dict.fromkeys(METHODS, 3),
        limit_seconds=settings.limit_seconds,
        problem=_Problem,
        measure=partial(_measure, settings=settings),
    )
    return ClaimResult(
        claim="e",
        title=TITLE,
        parts=judge(rows, wide=settings.wide),
        figures={"sizes": rows, "beside_cholesky": cheaper_than(rows, "kfac", "cheaper than K-FAC by Cholesky").seen},
        conditions={
            "layer": "d x d, square factors with eigenvalues 1/k^2, dense",
            "methods": {**METHODS, "rs-kfac": _settings_of("rs-kfac", settings)},
            "rs-kfac_defaults": "oversampling 10, 4 power iterations, damping rule pi",
            "damping": DAMPING,
            "dtype": "float32",
            "seconds": "least of up to five repetitions, CPU time of one thread",
            "limit_seconds": settings.limit_seconds,
        },
    )


def judge(rows: Sequence[dict[str, Any]], *, wide: int) -> tuple[Part, ...]:
    """Applies the rule of `measure_width_claim` to its rows."""
    large = [row for row in rows if row["d"] >= wide]
    parts = [cheaper_than(large, "kfac-eigen", f"cheaper than K-FAC by eigendecomposition at every d >= {wide}")]
    exponents = {name: exponent(large, name) for name in METHODS}
    own, eigen = exponents["rs-kfac"], exponents["kfac-eigen"]
    parts.append(
        Part(
            statement=f"seconds grow with an exponent of at most {EXPONENT_LIMIT:g}; eigendecompositions' with more",
            holds=None if own is None or eigen is None else own <= EXPONENT_LIMIT < eigen,
            seen=", ".join(f"{name} {'?' if value is None else f'{value:.2f}'}" for name, value in exponents.items()),
        )
    )
    return tuple(parts)


def cheaper_than(rows: Sequence[dict[str, Any]], other: str, statement: str) -> Part:
    """Compares RS-KFAC's seconds with another method's wherever both were measured."""
    both = (row for row in rows if row["rs-kfac"] and row[other])
    pairs = ((row["d"], row["rs-kfac"]["seconds"], row[other]["seconds"]) for row in both)
    return less_at_every_width(statement, pairs, "s")


def exponent(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    """Returns the slope of log seconds over log d by least squares; None with fewer than two sizes."""
    points = [(math.log(row["d"]), math.log(row[name]["seconds"])) for row in rows if row[name]]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def _settings_of(name: str, settings: Settings) -> dict[str, Any]:
    return {**METHODS[name], "rank": settings.rank} if name == "rs-kfac" else METHODS[name]


class _Problem:
    """Factors and a gradient of one width, and the first method's direction, which the others are compared with."""

    def __init__(self, d: int) -> None:
        generator = torch.Generator().manual_seed(d)
        self.factors = KroneckerFactors(A=_factor(d, generator), G=_factor(d, generator))
        self.gradient = torch.randn(1, d, d, generator=generator)
        self.truth: Tensor | None = None


def _factor(d: int, generator: torch.Generator) -> Tensor:
    """Makes a dense `[1, d, d]` factor whose k-th eigenvalue is 1/k^2."""
    matrix = torch.diag(torch.arange(1, d + 1).double().pow(-2))
    for _ in range(REFLECTIONS):
        v = torch.randn(d, 1, generator=generator, dtype=torch.float64)
        v /= v.norm()
        matrix = matrix - 2 * v @ (v.mT @ matrix)
        matrix = matrix - 2 * (matrix @ v) @ v.mT
    return ((matrix + matrix.mT) / 2).float()[None]


def _measure(name: str, problem: _Problem, *, settings: Settings) -> dict[str, Any]:
    """Times inversion and application, repeated while that takes less than three seconds, and takes the shortest."""
    inverter = make_inverter(name, **_settings_of(name, settings))
    found: list[Update] = []
    while not found or (len(found) < MOST_REPETITIONS and sum(map(_seconds, found)) < TARGET_SECONDS):
        found.append(update(inverter, problem.factors, problem.gradient, DAMPING))
    least = min(found, key=_seconds)
    truth = problem.truth = least.direction if problem.truth is None else problem.truth
    return {
        "seconds": _seconds(least),
        "invert": least.invert,
        "apply": least.apply,
        "repetitions": len(found),
        "error": float((least.direction - truth).norm() / truth.norm()),
    }


def _seconds(done: Update) -> float:
    return done.invert + done.apply
