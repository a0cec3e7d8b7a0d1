"""`kfdist bench inversion`: seconds and error of one inversion, by the size of a factor and by the rank.

The block has one factor of size d and one of size 16, so that the large one takes nearly all the time. Its matrix is of
rows in many directions whose lengths fall, so that the exact inverse is known whatever d is: that of the rows' Gram
matrix, in float64. Seconds are CPU seconds of one thread, float32, the least of the repetitions: what else the machine
does only lengthens them. Sums of outer products, alike for all, aren't in them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from kfdist import checks
from kfdist.bench.brand_floor import brand_floor, over_floor
from kfdist.bench.claim_e_widths import exponent
from kfdist.bench.factor_problem import DAMPING, EXAMPLES, FOLDINGS, SMALL, Problem
from kfdist.bench.results import conditions, table
from kfdist.bench.timings import gemm_rate
from kfdist.curvature.inverters import INVERTERS, make_inverter
from kfdist.curvature.spectra import EIGH_FLOPS
from kfdist.curvature.statistics import Increment, KroneckerFactors, MeanVectors
from kfdist.errors import ConfigError
from kfdist.report.drawing import SERIES, drawing, plain_powers

EXPONENTS: Mapping[str, int] = {"kfac": 3, "kfac-eigen": 3, "rs-kfac": 2, "sre-kfac": 2, "cg-fac": 2}
"""With which power of d a method's seconds are taken to grow at most, to foresee what would take too long; else 1."""

SETTINGS: Mapping[str, Mapping[str, Any]] = {"cg-fac": {"tolerance": 1e-6, "max_iterations": 100}}
"""Beside `rank` and `increment_rows`."""

LEFT_OUT = {
    "ekfac": "an inversion is kfac-eigen's; the scales are measured by the ranks",
    "ekfac-adam": "an inversion is kfac-eigen's; a direction is Adam's, not the inverse's",
    "kfac-tridiagonal": "couples a chain of layers",
    "two-level": "couples all layers; a block's inversion is that of its inner method",
    "shampoo": "takes gradients' moments; eigendecompositions are kfac-eigen's",
    "soap": "takes gradients' moments; eigendecompositions are kfac-eigen's",
    "kl-shampoo": "takes gradients' moments; eigendecompositions are kfac-eigen's",
    "b-r-kfac": "an update is b-kfac's, a refresh rs-kfac's",
    "b-kfac-c": "an update is b-kfac's, a correction less than rs-kfac's",
}

_REPETITION_SECONDS, _MOST_REPETITIONS = 1.5, 5


@dataclass(frozen=True, kw_only=True)
class InversionSettings:
    """What is measured.

    Attributes:
        methods: Keys of `INVERTERS`; all that are not in `LEFT_OUT` if empty.
        sizes: d, rising; each method at `rank`.
        ranks: Of the methods that have one, at `size_for_ranks`.
        rank: Eigenpairs kept.
        size_for_ranks: d.
        limit_seconds: A method isn't run at a size if from the size before it would take longer.
    """

    methods: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1024, 2048, 4608, 9216)
    ranks: tuple[int, ...] = (32, 64, 128, 220, 512)
    rank: int = 220
    size_for_ranks: int = 2048
    limit_seconds: float = 20.0

    def __post_init__(self) -> None:
        for name in self.methods:
            checks.choice("--method", name, [each for each in INVERTERS if each not in LEFT_OUT])
        least = self.rank + EXAMPLES
        if not self.sizes or min(self.sizes) < least:
            raise ConfigError(
                f"is {list(self.sizes)!r}; at least {least} is needed, since a Brand update of {EXAMPLES} rows and "
                f"rank {self.rank} has so many directions",
                path="--size",
            )

    @property
    def chosen(self) -> tuple[str, ...]:
        """The methods."""
        return self.methods or tuple(name for name in INVERTERS if name not in LEFT_OUT)


def measure_inversion(settings: InversionSettings) -> dict[str, Any]:
    """Times the methods at every size, and those with a rank at every rank."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in settings.chosen}
    for d in sorted(settings.sizes):
        problem = Problem(d)
        for name, points in found.items():
            if not points or _foreseen(name, points[-1], d) <= settings.limit_seconds:
                points.append({"d": d, "rank": settings.rank, **_measure(name, problem, settings.rank)})
        if found.get("b-kfac") and found["b-kfac"][-1]["d"] == d:
            found["b-kfac"][-1]["floor"] = brand_floor(d, settings.rank, EXAMPLES)
    problem = Problem(settings.size_for_ranks)
    by_rank = {
        name: [{"d": problem.d, "rank": rank, **_measure(name, problem, rank)} for rank in settings.ranks]
        for name in settings.chosen
        if has_rank(name)
    }
    rate = gemm_rate()
    return {
        "bench": "inversion",
        "config": {
            **asdict(settings),
            "methods": list(settings.chosen),
            "left_out": LEFT_OUT,
            "damping": DAMPING,
            "other_factor": SMALL,
            "increment_rows": EXAMPLES,
            "repetitions": f"least of up to {_MOST_REPETITIONS}",
        },
        "by_size": found,
        "by_rank": by_rank,
        "slopes": {
            name: exponent([{"d": each["d"], name: each} for each in points], name) for name, points in found.items()
        },
        "times_faster_than_eigh": faster(found),
        "brand_update_over_gemm_bound": brand_over_bound(found.get("b-kfac", []), settings.rank, rate),
        "brand_update_over_all_operations": brand_over_bound(
            found.get("b-kfac", []), settings.rank, rate, eigendecomposition=True
        ),
        "brand_update_over_its_products": over_floor(found.get("b-kfac", []), "products"),
        "brand_update_over_its_floor": over_floor(found.get("b-kfac", []), "products", "eigendecomposition"),
        "gemm_flops_per_second": rate,
    }


def _foreseen(name: str, last: Mapping[str, Any], d: int) -> float:
    return last["seconds"] * (d / last["d"]) ** EXPONENTS.get(name, 1)


def has_rank(name: str) -> bool:
    """Says whether a method keeps so many eigenpairs of a factor as it is told."""
    return "rank" in INVERTERS[name].__dataclass_fields__


def faster(by_size: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Returns by size how many times faster each method is than eigendecomposition, where both were measured."""
    eigen = {each["d"]: each["seconds"] for each in by_size.get("kfac-eigen", [])}
    return {
        str(d): {
            name: round(seconds / each["seconds"], 2)
            for name, points in by_size.items()
            for each in points
            if each["d"] == d and name != "kfac-eigen"
        }
        for d, seconds in eigen.items()
    }


def brand_over_bound(
    points: Sequence[Mapping[str, Any]], rank: int, rate: float, *, eigendecomposition: bool = False
) -> dict[str, float]:
    """Returns by size how many times longer a Brand update takes than its products at the rate of GEMM.

    With r eigenpairs, n rows and s = r + n, the products are coefficients of the rows and their rest (4 d r n), an
    orthogonal basis of the rest (4 d n^2), and the new eigenvectors, all of which the inverse needs (2 d s^2).

    Args:
        points: b-kfac's measurements.
        rank: r.
        rate: Of products, in operations a second.
        eigendecomposition: Count that of the small matrix too (9 s^3), which is no product.
    """
    n = EXAMPLES
    s = rank + n
    products, small = 4 * rank * n + 4 * n * n + 2 * s * s, EIGH_FLOPS * s**3 * eigendecomposition
    return {str(each["d"]): round(each["seconds"] * rate / (each["d"] * products + small), 2) for each in points}


def _measure(name: str, problem: Problem, rank: int) -> dict[str, Any]:
    settings = dict(SETTINGS.get(name, {}))
    fields = INVERTERS[name].__dataclass_fields__
    settings |= {"rank": rank} if "rank" in fields else {}
    settings |= {"increment_rows": EXAMPLES} if "increment_rows" in fields else {}
    settings |= {"direction_error": 0} if "direction_error" in fields else {}  # the rank is what is measured
    inverter = make_inverter(name, **settings)
    invert, truth = _inversion(inverter, problem)
    seconds, made = [], None
    while made is None or (len(seconds) < _MOST_REPETITIONS and sum(seconds) < _REPETITION_SECONDS):
        begun = time.thread_time()
        made = invert()
        seconds.append(time.thread_time() - begun)
    begun = time.thread_time()
    direction = made.apply(problem.gradient, DAMPING)
    applied = time.thread_time() - begun
    expected = truth()
    error = float((direction.double() - expected).norm() / expected.norm())
    return {"seconds": min(seconds), "seconds_to_apply": applied, "error": error, "repetitions": len(seconds)}


def _inversion(inverter: Any, problem: Problem) -> tuple[Callable[[], Any], Callable[[], Tensor]]:
    """Returns the call to be timed, and what gives the direction that its result is compared with."""

    def made(statistics: Any, state: Mapping[str, Tensor], seed: int = 0) -> Any:
        return inverter.invert(statistics, damping=DAMPING, previous=state, seed=seed)

    def by(statistics: Any) -> Callable[[], Any]:
        return lambda: _usable(made(statistics, {}).preconditioner, inverter.name)

    if inverter.statistic is Increment:
        state: dict[str, Tensor] = {}
        for number in range(FOLDINGS - 1):
            state = dict(made(problem.increment(number), state, number).state)
        last = problem.increment(FOLDINGS - 1)
        return (
            lambda: _usable(made(last, state, FOLDINGS - 1).preconditioner, inverter.name),
            lambda: problem.truth(inverter.damping_rule),
        )
    if inverter.statistic is KroneckerFactors:
        return by(problem.factors()), lambda: problem.truth(getattr(inverter, "damping_rule", "common"))
    statistics = problem.means() if inverter.statistic is MeanVectors else problem.samples()
    return by(statistics), lambda: _in_float64(inverter, statistics, problem.gradient)


def _usable(preconditioner: Any, name: str) -> Any:
    if preconditioner is None:
        raise RuntimeError(f"{name} could not invert the benchmark's statistics")
    return preconditioner


def _in_float64(inverter: Any, statistics: Any, gradient: Tensor) -> Tensor:
    """Returns what the same method gives in float64, iterations to the end: its own exact direction."""
    if inverter.name == "cg-fac":
        inverter = replace(inverter, tolerance=1e-13, max_iterations=2000)
    exact = type(statistics)(
        **{name: value.double() if value.is_floating_point() else value for name, value in vars(statistics).items()}
    )
    made = inverter.invert(exact, damping=DAMPING, previous={}, seed=0).preconditioner
    return _usable(made, inverter.name).apply(gradient.double(), DAMPING)


def describe(content: Mapping[str, Any]) -> str:
    """Puts a measurement into tables."""
    config, by_size, by_rank = content["config"], content["by_size"], content["by_rank"]
    sizes = sorted({each["d"] for points in by_size.values() for each in points})

    def row(name: str, points: Sequence[Mapping[str, Any]], key: str, of: Sequence[int], by: str) -> list[object]:
        found = {each[by]: each[key] for each in points}
        return [name, *(found.get(each) for each in of)]

    slopes = content["slopes"]
    parts = [
        table(
            ["seconds by d", *map(str, sizes), "slope"],
            [[*row(name, points, "seconds", sizes, "d"), slopes[name]] for name, points in by_size.items()],
        ),
        table(
            ["error by d", *map(str, sizes)],
            [row(name, points, "error", sizes, "d") for name, points in by_size.items()],
        ),
    ]
    for key in ("seconds", "error") if by_rank else ():
        rows = [row(name, points, key, config["ranks"], "rank") for name, points in by_rank.items()]
        parts.append(table([f"{key} by rank, d = {config['size_for_ranks']}", *map(str, config["ranks"])], rows))
    for d, times in content["times_faster_than_eigh"].items():
        found = ", ".join(f"{name} {value:g}" for name, value in times.items())
        parts.append(f"d = {d}: times faster than eigendecomposition: {found}")
    for key, what in (
        ("brand_update_over_gemm_bound", "of its products at the rate of GEMM"),
        ("brand_update_over_all_operations", "of these and of the small eigendecomposition at that rate"),
        ("brand_update_over_its_products", "that its products take alone"),
        ("brand_update_over_its_floor", "that these and the small eigendecomposition take alone"),
    ):
        bounds = ", ".join(f"{value:g} at d = {d}" for d, value in content[key].items())
        parts.append(f"a Brand update of {EXAMPLES} rows over the seconds {what}: {bounds or 'not measured'}")
    return "\n\n".join([*parts, conditions(content)])


def plot(content: Mapping[str, Any]) -> str:
    """Draws seconds over d, and the error over the rank."""
    by_size, by_rank = content["by_size"], content["by_rank"]
    colours = {name: SERIES[number % len(SERIES)] for number, name in enumerate(by_size)}
    with drawing(3.4, columns=2) as drawn:
        left, right = drawn.axes
        for name, points in by_size.items():
            ds, seconds = [each["d"] for each in points], [each["seconds"] for each in points]
            left.plot(ds, seconds, color=colours[name], marker="o", markersize=3, label=name)
        for name, points in by_rank.items():
            ranks, errors = [each["rank"] for each in points], [each["error"] for each in points]
            right.plot(ranks, errors, color=colours[name], marker="o", markersize=3)
        for axes, x, y in ((left, "size d of the factor", "seconds"), (right, "rank", "error of the direction")):
            axes.set_xscale("log")
            axes.set_yscale("log")
            plain_powers(axes.xaxis)
            plain_powers(axes.yaxis)
            axes.set_xlabel(x)
            axes.set_ylabel(y)
        left.set_xticks(sorted({each["d"] for points in by_size.values() for each in points}))
        right.set_xticks(list(content["config"]["ranks"]))
        drawn.figure.subplots_adjust(left=0.13, right=0.98, bottom=0.4, top=0.97, wspace=0.42)
        drawn.figure.legend(loc="lower center", ncols=3)
    return drawn.svg
