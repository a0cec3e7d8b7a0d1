"""Rows of single examples, drawn in float64 from a fixed seed, then rounded; and rows that stand for given factors."""

import torch
from torch import Tensor

from kfdist.curvature.statistics import KroneckerFactors, MeanVectors, Samples
from tests.support.increments import root_rows
from tests.support.matrices import gaussian


def make_samples(
    *,
    n: int,
    p: int,
    q: int,
    c: int = 2,
    t: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    weight: list[float] | None = None,
    positions: float | None = None,
    terms: list[float] | None = None,
) -> Samples:
    """Gaussian rows with uneven scales, so that the factors aren't near multiples of the identity."""
    a = gaussian(c, n, t, q, seed=2 * seed) * torch.linspace(0.3, 2.0, q, dtype=torch.float64)
    g = gaussian(c, n, t, p, seed=2 * seed + 1) * torch.linspace(1.5, 0.2, p, dtype=torch.float64)
    return Samples(
        a=a.to(dtype),
        g=g.to(dtype),
        weight=torch.tensor(weight if weight is not None else [1.0] * n, dtype=dtype),
        terms=torch.tensor(terms if terms is not None else [1.0] * n, dtype=dtype),
        source=torch.zeros(n, dtype=torch.int64),
        positions=torch.full((n,), float(t) if positions is None else positions, dtype=dtype),
    )


def select(samples: Samples, chosen: Tensor | slice) -> Samples:
    """Some of the examples, or all in another order."""
    return Samples(
        a=samples.a[:, chosen],
        g=samples.g[:, chosen],
        **{name: getattr(samples, name)[chosen] for name in ("weight", "terms", "source", "positions")},
    )


def rows_of(factors: KroneckerFactors) -> Samples:
    """Examples whose Omega and Gamma are the two factors; which a stands beside which g means nothing."""
    a, g = root_rows(factors.A), root_rows(factors.G)
    n = max(a.shape[-2], g.shape[-2])
    return _samples(_filled(a, n) * n**0.5, _filled(g, n) * n**0.5)


def pairs_of(factors: KroneckerFactors) -> Samples:
    """Examples, one per pair of rows, whose Fisher block is the product of the two factors."""
    a, g = root_rows(factors.A), root_rows(factors.G)
    n_a, n_g = a.shape[-2], g.shape[-2]
    root = (n_a * n_g) ** 0.5
    return _samples(a.repeat(1, n_g, 1) * root, g.repeat_interleave(n_a, dim=1))


def leading_rows(factors: KroneckerFactors) -> MeanVectors:
    """Vectors whose outer products are the factors' rank-one parts."""
    return MeanVectors(a=root_rows(factors.A)[:, -1].contiguous(), g=root_rows(factors.G)[:, -1].contiguous())


def _samples(a: Tensor, g: Tensor) -> Samples:
    n = a.shape[1]
    return Samples(
        a=a.unsqueeze(2),
        g=g.unsqueeze(2),
        weight=torch.ones(n, dtype=a.dtype),
        terms=torch.ones(n, dtype=a.dtype),
        source=torch.zeros(n, dtype=torch.int64),
        positions=torch.ones(n, dtype=a.dtype),
    )


def _filled(rows: Tensor, n: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(rows.shape[0], n - rows.shape[1], rows.shape[2])], dim=1)
