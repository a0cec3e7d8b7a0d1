"""Inverses multiplied onto a gradient in its own memory, against their products with it elsewhere."""

import pytest
import torch
from torch import Tensor

from kfdist.linalg.kronecker import FactoredInverse, Spectrum
from kfdist.linalg.projected import ProjectedGradient
from tests.support.kernel_launches import Launches
from tests.support.matrices import relative_error

P, Q = 20, 15

SIZES = ((P, Q), (Q, P))


def spectrum(d: int, r: int, seed: int, *, tail: float = 0.1) -> Spectrum:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(1, d, d, generator=generator, dtype=torch.float64)).Q[..., :r]
    values = torch.rand(1, r, generator=generator, dtype=torch.float64).sort(descending=True).values + tail
    return Spectrum(vectors.contiguous(), values, torch.full((1,), tail, dtype=torch.float64))


def inverse(p: int = P, q: int = Q, damping: float = 0.2) -> FactoredInverse:
    A, G = spectrum(q, 4, 0), spectrum(p, 3, 1)
    return FactoredInverse.of(A, G, *(torch.full((1,), damping, dtype=torch.float64),) * 2, steady=True)


def gradient(p: int = P, q: int = Q) -> Tensor:
    return torch.randn(1, p, q, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("p", "q"), SIZES)
def test_direction_and_product(p: int, q: int, apart: bool) -> None:
    V, scale = gradient(p, q), 0.7
    X, _ = inverse(p, q).solve(V)
    parts = (V[..., :-1].contiguous(), V[..., -1:].contiguous()) if apart else (V.clone(),)
    projected = ProjectedGradient.of(inverse(p, q), parts)
    assert relative_error(torch.cat(parts, -1), V) == 0, "projecting changes nothing"
    product = projected.product()
    assert product is not None and relative_error(product.squeeze(), (X * V).sum()) < 1e-12
    with Launches() as launches:
        projected.overwrite(scale)
    assert relative_error(torch.cat(parts, -1), scale * X) < 1e-12
    assert launches.by_name == {"baddbmm_": len(parts)}, "one pass over each"


def test_a_product_that_rounding_decides_on_is_none() -> None:
    A, G = spectrum(Q, 4, 0, tail=1e-12), spectrum(P, 3, 1, tail=1e-12)
    strong = FactoredInverse.of(A, G, *(torch.full((1,), 1e-8, dtype=torch.float64),) * 2, steady=True)
    inside = G.vectors @ gradient()[:, :3, :4] @ A.vectors.mT
    assert ProjectedGradient.of(strong, (inside,)).product() is None
    assert ProjectedGradient.of(strong, (gradient(),)).product() is not None
