"""SENG's forms and aggregates against the dense solve: error, time and size (docs/papers.md, claim c)."""

import statistics
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kfdist.bench.claims import ClaimResult, Part
from kfdist.bench.measuring import update
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.references import example_gradients, solve_dense, weighted_fisher
from kfdist.curvature.statistics import Samples
from kfdist.wire.records import tensor_fields

TITLE = (
    "SENG's implicit form equals the explicit one for less memory and time; its mean-field product and its average of "
    "local operators are nearer to the exact direction than the gradient is (2006.05924)"
)
EXACT = 1e-10
_LAYER = "layer {p} x {q}, {n} examples of {t} positions"

FORMS: dict[str, dict[str, Any]] = {
    "explicit": {"form": "explicit"},
    "explicit, sketched": {"form": "explicit", "column_sample_size": 24},
    "implicit": {"form": "implicit"},
    "implicit, sketched": {"form": "implicit", "column_sample_size": 24},
    "implicit, mean-field": {"form": "implicit", "back_projection": "mean-field"},
}
"""Settings by the name they have in the result; a sketch takes 576 entries."""

COMMON = {"independent": 0.0, "alike": 1.0, "nearly equal": 4.0}
"""How much longer the part that all examples share is than the part that each has for itself."""

DAMPING_SHARE = 0.1
"""lambda over the mean eigenvalue of the Gram matrix."""

REPETITIONS = 3

SMALL = {True: {"n": 16, "t": 4, "p": 8, "q": 13}, False: {"n": 64, "t": 9, "p": 32, "q": 73}}
LARGE = {True: {"n": 16, "t": 16, "p": 32, "q": 73}, False: {"n": 128, "t": 16, "p": 128, "q": 577}}
"""The layers, quick or not."""


def measure_seng_claim(quick: bool = False) -> ClaimResult:
    """Measures claim c.

    The rule, fixed before the measurement. Shown if, for all kinds of data,
    - without a sketch, both forms equal the dense solve to 1e-10, and so does the global operator over 1, 2 and 4
      ranks;
    - the implicit form stores fewer bytes and inverts in fewer seconds than the explicit one;
    - the mean-field product is nearer to the dense direction than the scaled gradient v/lambda is;
    - the average of local operators is nearer to it than v/lambda at 2 and 4 ranks, and exact at 1.

    Args:
        quick: Small rows, once.
    """
    found = measure_seng(quick=quick)
    return ClaimResult(
        claim="c",
        title=TITLE,
        parts=judge_seng(found),
        figures=found,
        conditions={
            "errors": "relative to a dense solve, float64; " + _LAYER.format(**SMALL[quick]),
            "costs": "float32; " + _LAYER.format(**LARGE[quick]),
            "data": f"Gaussian; the part that all examples share is so many times longer than their own: {COMMON}",
            "damping": f"{DAMPING_SHARE} of the Gram matrix's mean eigenvalue",
            "sketch": "24 columns",
        },
    )


def judge_seng(found: dict[str, Any]) -> tuple[Part, ...]:
    """Applies the rule of `measure_seng_claim` to what `measure_seng` returned."""
    forms, aggregates, plain = found["forms"], found["aggregates"], found["gradient_to_dense"]
    explicit, implicit, mean_field = (forms[name] for name in ("explicit", "implicit", "implicit, mean-field"))
    unsketched = max(max(form["error_to_dense"].values()) for form in (explicit, implicit))
    spread = max(row["global_to_dense"] for rows in aggregates.values() for row in rows.values())
    alone = max(rows["1"]["local_average_to_dense"] for rows in aggregates.values())
    local = {
        kind: max(rows[ranks]["local_average_to_dense"] for ranks in ("2", "4")) for kind, rows in aggregates.items()
    }

    def against_gradient(errors: dict[str, float]) -> str:
        return ", ".join(f"{kind}: {error:.2g} against {plain[kind]:.2g}" for kind, error in errors.items())

    return (
        Part(
            statement="explicit and implicit equal the dense solve to 1e-10",
            holds=unsketched <= EXACT,
            seen=f"at most {unsketched:.1g}",
        ),
        Part(
            statement="global equals it over 1, 2 and 4 ranks, local-average over 1",
            holds=max(spread, alone) <= EXACT,
            seen=f"at most {max(spread, alone):.1g}",
        ),
        Part(
            statement="implicit stores fewer bytes than explicit",
            holds=implicit["record_bytes"] < explicit["record_bytes"],
            seen=f"{implicit['record_bytes'] / 1e6:.3g} MB, not {explicit['record_bytes'] / 1e6:.3g} MB",
        ),
        Part(
            statement="implicit inverts in fewer seconds than explicit",
            holds=implicit["invert_seconds"] < explicit["invert_seconds"],
            seen=f"{implicit['invert_seconds']:.3g} s, not {explicit['invert_seconds']:.3g} s; a direction "
            f"{1e3 * implicit['apply_seconds']:.3g} ms, not {1e3 * explicit['apply_seconds']:.3g} ms",
        ),
        Part(
            statement="mean-field is nearer to the dense direction than v/lambda, for all data",
            holds=all(error < plain[kind] for kind, error in mean_field["error_to_dense"].items()),
            seen=f"{against_gradient(mean_field['error_to_dense'])}; "
            f"a direction {1e3 * mean_field['apply_seconds']:.3g} ms",
        ),
        Part(
            statement="local-average over 2 and 4 ranks is nearer to it than v/lambda, for all data",
            holds=all(error < plain[kind] for kind, error in local.items()),
            seen=against_gradient(local),
        ),
    )


def measure_seng(*, quick: bool = False) -> dict[str, Any]:
    """Measures on synthetic convolutional rows; takes about half a minute on one core.

    Errors are relative, in float64, of a layer of 32 x 73 with 64 examples of 9 positions, against a dense solve with
    the Fisher matrix of all examples. Times and sizes are of 128 x 577 with 128 examples of 16 columns in float32.

    Args:
        quick: Take smaller layers.

    Returns:
        JSON values: `forms` (per form: errors by data, seconds, bytes), `aggregates` (per data and number of ranks),
        and `gradient_to_dense`, the error of v/lambda: a form with more than this is worse than none.
    """
    small = {kind: _draw(**SMALL[quick], common=common, seed=1) for kind, common in COMMON.items()}
    large = _draw(**LARGE[quick], common=1.0, seed=2)[0]
    large = replace(large, a=large.a.float(), g=large.g.float(), weight=large.weight.float())
    truth = {kind: _truth(samples, V) for kind, (samples, V) in small.items()}
    return {
        "gradient_to_dense": {kind: _error(V / _damping(samples), truth[kind]) for kind, (samples, V) in small.items()},
        "forms": {
            name: {
                "error_to_dense": {
                    kind: _error(_apply(settings, samples, V), truth[kind]) for kind, (samples, V) in small.items()
                },
                **_cost(settings, large),
            }
            for name, settings in FORMS.items()
        },
        "aggregates": {
            kind: {str(ranks): _aggregates(samples, V, truth[kind], ranks) for ranks in (1, 2, 4)}
            for kind, (samples, V) in small.items()
        },
    }


def _draw(*, n: int, t: int, p: int, q: int, common: float, seed: int) -> tuple[Samples, Tensor]:
    """Draws examples and, from as many others of the same distribution, a mean gradient `[1, p, q]`."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shared_a, shared_g = common * gaussian(1, 1, t, q), common * gaussian(1, 1, t, p)
    a, g = shared_a + gaussian(1, 2 * n, t, q), shared_g + gaussian(1, 2 * n, t, p)
    others = (g[:, n:].mT @ a[:, n:]).mean(1)
    samples = Samples(
        a=a[:, :n].contiguous(),
        g=g[:, :n].contiguous(),
        weight=torch.ones(n, dtype=torch.float64),
        source=torch.zeros(n, dtype=torch.int64),
        terms=torch.ones(n, dtype=torch.float64),
        positions=torch.full((n,), float(t), dtype=torch.float64),
    )
    return samples, others


def _damping(samples: Samples) -> float:
    """Returns lambda for these samples, tr(F)/n times `DAMPING_SHARE`."""
    trace = float(example_gradients(samples).square().sum()) / samples.a.shape[1]
    return DAMPING_SHARE * trace / samples.a.shape[1]


def _truth(samples: Samples, V: Tensor) -> Tensor:
    return solve_dense(weighted_fisher(samples), _damping(samples), V)


def _apply(settings: dict[str, Any], samples: Samples, V: Tensor) -> Tensor:
    return update(make_inverter("seng", **settings), samples, V, _damping(samples)).direction


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _cost(settings: dict[str, Any], samples: Samples) -> dict[str, float]:
    """Returns medians of the CPU seconds of an inversion and of an application, and the bytes of the record."""
    inverter, V = make_inverter("seng", **settings), torch.ones(1, samples.g.shape[-1], samples.a.shape[-1])
    _, *timed = [update(inverter, samples, V, 1.0) for _ in range(1 + REPETITIONS)]  # the first one warms up
    return {
        "invert_seconds": round(statistics.median(each.invert for each in timed), 4),
        "apply_seconds": round(statistics.median(each.apply for each in timed), 5),
        "record_bytes": sum(tensor.nbytes for tensor in tensor_fields(timed[0].inverse).values()),
    }


def _aggregates(samples: Samples, V: Tensor, truth: Tensor, ranks: int) -> dict[str, float]:
    """Compares both aggregates where the examples fall evenly to the ranks."""
    source = torch.arange(samples.a.shape[1]) * ranks // samples.a.shape[1]
    spread = replace(samples, source=source)
    everyone = _apply({"aggregate": "global"}, spread, V)
    average = _apply({"aggregate": "local-average"}, spread, V)
    return {
        "global_to_dense": _error(everyone, truth),
        "local_average_to_dense": _error(average, truth),
        "local_average_to_global": _error(average, everyone),
        "local_average_length": float(average.norm() / everyone.norm()),
        "local_average_cosine": float((average * everyone).sum() / (average.norm() * everyone.norm())),
    }
