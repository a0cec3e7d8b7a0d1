"""Inverse roots by products alone equal those by eigenvalues; products along the modes of a tensor."""

import pytest
import torch
from torch import Tensor

from kfdist.linalg.modes import mode_moment, mode_products
from kfdist.linalg.psd import eigh_descending
from kfdist.linalg.roots import newton_root, root_of_spectrum
from tests.support.matrices import relative_error


def matrices(decades: float, scales: tuple[float, ...] = (1e-9, 1.0, 1e9), d: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(len(scales), d, d, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, -decades, d, dtype=torch.float64) * torch.tensor(scales, dtype=torch.float64)[:, None]
    return (Q * values.unsqueeze(-2)) @ Q.mT


@pytest.mark.parametrize("p", [1, 2, 4, 8])
@pytest.mark.parametrize(("decades", "dtype", "tolerance"), [(6, torch.float64, 1e-9), (3, torch.float32, 1e-4)])
def test_newtons_root_is_that_of_the_eigenvalues(p: int, decades: float, dtype: torch.dtype, tolerance: float) -> None:
    M = matrices(decades)
    found = newton_root(M.to(dtype), p)
    exact = root_of_spectrum(*eigh_descending(M), 1.0 / p)
    for ours, expected in zip(found.matrix, exact, strict=True):
        assert relative_error(ours, expected) < tolerance
    assert float(found.error.max()) < 1e-5


def test_a_root_that_is_not_reached_says_so() -> None:
    """In float32 the smallest eigenvalue, 1e-12 of the largest, is rounding."""
    found = newton_root(matrices(12, scales=(1.0,)).float(), 4)
    assert not float(found.error.max()) < 1e-5


def test_products_and_moments_along_modes() -> None:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    A, B, C = (torch.randn(2, d, d, generator=generator, dtype=torch.float64) for d in (3, 4, 5))
    expected = torch.einsum("zai,zbj,zck,zijk->zabc", A, B, C, X)
    torch.testing.assert_close(mode_products(X, [A, B, C]), expected)
    for mode, letters in enumerate(("zajk,zbjk->zab", "ziak,zibk->zab", "zija,zijb->zab")):
        torch.testing.assert_close(mode_moment(X, mode), torch.einsum(letters, X, X))
