"""SENG's forms and aggregates against the dense solve: error, time and size (docs/papers.md, claim c)."""

import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.preconditioners import AbstractPreconditioner
from kfdist.curvature.records import tensor_fields
from kfdist.curvature.references import solve_dense
from kfdist.curvature.references_samples import example_gradients, weighted_fisher
from kfdist.curvature.statistics import Samples

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


def measure_seng() -> dict[str, Any]:
    """Measures on synthetic convolutional rows; takes about half a minute on one core.

    Errors are relative, in float64, of a layer of 32 x 73 with 64 examples of 9 positions, against a dense solve with
    the Fisher matrix of all examples. Times and sizes are of 128 x 577 with 128 examples of 16 columns in float32.

    Returns:
        JSON values: `forms` (per form: errors by data, seconds, bytes), `aggregates` (per data and number of ranks),
        and `gradient_to_dense`, the error of v/lambda: a form with more than this is worse than none.
    """
    small = {kind: _draw(n=64, t=9, p=32, q=73, common=common, seed=1) for kind, common in COMMON.items()}
    large = _draw(n=128, t=16, p=128, q=577, common=1.0, seed=2)[0]
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
        positions=float(t),
    )
    return samples, others


def _damping(samples: Samples) -> float:
    """Returns lambda for these samples, tr(F)/n times `DAMPING_SHARE`."""
    trace = float(example_gradients(samples).square().sum()) / samples.a.shape[1]
    return DAMPING_SHARE * trace / samples.a.shape[1]


def _truth(samples: Samples, V: Tensor) -> Tensor:
    return solve_dense(weighted_fisher(samples), _damping(samples), V)


def _invert(settings: dict[str, Any], samples: Samples) -> AbstractPreconditioner:
    made = make_inverter("seng", **settings).invert(samples, damping=1.0, previous={}, seed=0).preconditioner
    assert made is not None, "no form fails on these samples"
    return made


def _apply(settings: dict[str, Any], samples: Samples, V: Tensor) -> Tensor:
    return _invert(settings, samples).apply(V, _damping(samples))


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _cost(settings: dict[str, Any], samples: Samples) -> dict[str, float]:
    """Returns medians of the seconds of an inversion and of an application, and the bytes of the record."""
    V = torch.ones(1, samples.g.shape[-1], samples.a.shape[-1])
    inversions: list[float] = []
    applications: list[float] = []
    made = _invert(settings, samples)
    for _ in range(REPETITIONS):
        begun = time.perf_counter()
        made = _invert(settings, samples)
        inverted = time.perf_counter()
        made.apply(V, 1.0)
        inversions.append(inverted - begun)
        applications.append(time.perf_counter() - inverted)
    return {
        "invert_seconds": round(statistics.median(inversions), 4),
        "apply_seconds": round(statistics.median(applications), 5),
        "record_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensor_fields(made).values()),
    }


def _aggregates(samples: Samples, V: Tensor, truth: Tensor, ranks: int) -> dict[str, float]:
    """Compares both aggregates where the examples fall evenly to so many ranks."""
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
