"""Factors with chosen spectra, good and bad. Everything is drawn in float64 from a fixed seed, then rounded."""

from collections.abc import Callable

import torch
from torch import Tensor

from kfdist.curvature.statistics import KroneckerFactors

C, P, Q = 2, 7, 12
"""Groups and sizes of the generated factors: odd and even, small enough for a dense solve of the product."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def with_spectrum(values: Tensor, *, seed: int) -> Tensor:
    """Returns a symmetric matrix `[..., d, d]` with eigenvalues `[..., d]` and random eigenvectors."""
    basis = torch.linalg.qr(gaussian(*values.shape, values.shape[-1], seed=seed)).Q
    matrix = basis @ torch.diag_embed(values.double()) @ basis.mT
    return (matrix + matrix.mT) / 2


def _spectrum(of: Callable[[int], Tensor]) -> Callable[[int, int], Tensor]:
    return lambda d, seed: with_spectrum(of(d).double().expand(C, d), seed=seed)


def _rank_one(d: int, seed: int) -> Tensor:
    row = gaussian(C, d, 1, seed=seed)
    return row @ row.mT


def _spoiled(value: float) -> Callable[[int, int], Tensor]:
    def make(d: int, seed: int) -> Tensor:
        matrix = GOOD["well-conditioned"](d, seed).clone()
        matrix[0, 1, 2] = matrix[0, 2, 1] = value
        return matrix

    return make


def _negative_diagonal(d: int, seed: int) -> Tensor:
    matrix = GOOD["well-conditioned"](d, seed).clone()
    matrix[0, 1, 1] = -0.1
    return matrix


def _asymmetric(d: int, seed: int) -> Tensor:
    matrix = GOOD["well-conditioned"](d, seed).clone()
    matrix[0, 1, 2] += 0.5
    return matrix


def _indefinite(d: int, seed: int) -> Tensor:
    """Positive on the diagonal, so only an eigenvalue gives it away."""
    matrix = with_spectrum(torch.linspace(0.5, 2.0, d).expand(C, d), seed=seed)
    values, vectors = torch.linalg.eigh(matrix)
    values[:, 0] = -0.2
    matrix = vectors @ torch.diag_embed(values) @ vectors.mT
    matrix = (matrix + matrix.mT) / 2
    assert float(matrix.diagonal(dim1=-2, dim2=-1).min()) > 0
    return matrix


GOOD: dict[str, Callable[[int, int], Tensor]] = {
    "well-conditioned": _spectrum(lambda d: torch.linspace(2.0, 0.5, d)),
    "decaying": _spectrum(lambda d: 0.5 ** torch.arange(d)),
    "huge-condition": _spectrum(lambda d: torch.logspace(0, -14, d, dtype=torch.float64)),
    "singular": _spectrum(lambda d: torch.where(torch.arange(d) < d // 2, 1.0 / (1 + torch.arange(d)), 0.0)),
    "one-sample": _rank_one,
    "zero": lambda d, seed: torch.zeros(C, d, d, dtype=torch.float64),
    "tiny": _spectrum(lambda d: 1e-12 * torch.linspace(2.0, 0.5, d, dtype=torch.float64)),
    "large": _spectrum(lambda d: 1e12 * torch.linspace(2.0, 0.5, d, dtype=torch.float64)),
}
"""Second moments that can occur; every method must invert them."""

BAD: dict[str, Callable[[int, int], Tensor]] = {
    "nan": _spoiled(float("nan")),
    "inf": _spoiled(float("inf")),
    "negative-diagonal": _negative_diagonal,
    "asymmetric": _asymmetric,
    "indefinite": _indefinite,
}
"""Matrices that are no second moments; the outcome must say so."""


def make_factors(spectrum: str, dtype: torch.dtype, *, good_G: bool = False) -> KroneckerFactors:
    """Returns both factors with the named spectrum; with `good_G` only A has it."""
    make = {**GOOD, **BAD}[spectrum]
    G = GOOD["well-conditioned"](P, 2) if good_G else make(P, 2)
    return KroneckerFactors(A=make(Q, 1).to(dtype), G=G.to(dtype))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Returns ||found - expected|| / ||expected||, Frobenius, in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
