"""Bases completed by reflections: orthonormal, with the given columns first, and as good as the dense matrix."""

import pytest
import torch
from torch import Tensor

from kfdist.linalg.orthonormal_basis import OrthonormalBasis
from tests.support.matrices import gaussian, relative_error

C = 2
SHAPES = [(300, 64), (300, 299), (97, 1)]


def columns(d: int, r: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.qr(gaussian(C, d, r, seed=d + r)).Q.to(dtype)


def loss(Q: Tensor) -> float:
    Q = Q.double()
    return float(torch.linalg.matrix_norm(Q.mT @ Q - torch.eye(Q.shape[-1], dtype=torch.float64)).max())


@pytest.mark.parametrize(("d", "r"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_orthonormal_and_begins_with_the_columns_up_to_signs(d: int, r: int, dtype: torch.dtype) -> None:
    V = columns(d, r, dtype)
    Q = OrthonormalBasis.completing(V).matrix()
    assert Q.shape == (C, d, d)
    assert loss(Q) < 16 * d**0.5 * torch.finfo(dtype).eps
    signs = (Q[..., :r] * V).sum(-2).sign().unsqueeze(-2)
    assert relative_error(Q[..., :r] * signs, V) < 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("d", "r"), SHAPES)
def test_both_forms_rotate_alike(d: int, r: int) -> None:
    few = OrthonormalBasis.completing(columns(d, r))
    whole = OrthonormalBasis.whole(few.matrix())
    assert few.reflected
    assert not whole.reflected
    rows, upright = gaussian(C, 5, d, seed=1), gaussian(C, d, 5, seed=2)
    Q = whole.matrix()
    for basis in (few, whole):
        assert basis.size == d
        assert relative_error(basis.rotated(rows), rows @ Q) < 1e-13
        assert relative_error(basis.rotated_back(rows), rows @ Q.mT) < 1e-13
        assert relative_error(basis.columns_rotated(upright), Q.mT @ upright) < 1e-13
        assert relative_error(basis.columns_rotated_back(upright, 0.5), 0.5 * Q @ upright) < 1e-13
        assert relative_error(basis.rotated_back(basis.rotated(rows)), rows) < 1e-13
        assert relative_error(basis.columns_rotated_back(basis.columns_rotated(upright)), upright) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_axes_among_the_columns_need_no_reflection(dtype: torch.dtype) -> None:
    """Decompositions have axes for eigenvectors where inputs never differed from zero."""
    V = torch.zeros(C, 40, 6, dtype=dtype)
    V[:, torch.arange(3), torch.arange(3)] = 1.0  # in their place already
    V[:, 20:, 3:5] = columns(20, 2, dtype)
    V[:, 7, 5] = -1.0
    basis = OrthonormalBasis.completing(V)
    assert bool(basis.W.isfinite().all())
    assert loss(basis.matrix()) < 100 * torch.finfo(dtype).eps
    assert relative_error(basis.matrix()[..., :6].abs(), V.abs()) < 100 * torch.finfo(dtype).eps


def test_it_is_orthonormal_where_the_columns_are_only_nearly() -> None:
    """A sketch's eigenvectors have lost digits; a step must not."""
    V = columns(200, 50) + 1e-3 * gaussian(C, 200, 50, seed=3)
    assert loss(OrthonormalBasis.completing(V).matrix()) < 1e-12


def test_beyond_the_columns_directions_are_near_to_axes() -> None:
    Q = OrthonormalBasis.completing(columns(400, 20)).matrix()
    assert float(Q.diagonal(dim1=-2, dim2=-1)[..., 20:].min()) > 0.5
