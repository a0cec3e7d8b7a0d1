"""Orthonormal columns by the Cholesky factor of their Gram matrix, and what is known of their loss beforehand."""

import pytest
import torch
from torch import Tensor

from kfdist.linalg import gram as module
from kfdist.linalg.gram import LOSS_TOLERANCE, cholesky, gram
from tests.support.matrices import gaussian, relative_error

C, D, N = 2, 300, 100


def columns(smallest: float) -> Tensor:
    """Returns columns whose singular values fall from 1 to `smallest`, and whose lengths hardly differ."""
    left, right = torch.linalg.qr(gaussian(C, D, N, seed=1)).Q, torch.linalg.qr(gaussian(C, N, N, seed=2)).Q
    values = torch.logspace(0, torch.tensor(smallest).log10().item(), N, dtype=torch.float64)
    return left * values @ right.mT


@pytest.mark.parametrize("summed", [77, 768])
def test_the_lower_triangle_is_the_gram_matrixs(summed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SUMMED", summed)
    E = columns(1e-2).float()
    exact = E.double().mT @ E.double()
    assert gram(E).dtype == torch.float64
    assert relative_error(gram(E).tril(), exact.tril()) <= 1e-14


@pytest.mark.parametrize("smallest", [1.0, 1e-1, 1e-3])
def test_the_loss_of_orthogonality_is_the_one_foretold(smallest: float) -> None:
    E = columns(smallest).float()
    triangle = cholesky(gram(E))
    assert triangle is not None
    Q = E @ triangle.inverse.float()
    assert relative_error(Q.double() @ triangle.R, E.double()) <= 1e-5
    Q = Q.double()
    loss = torch.linalg.matrix_norm(Q.mT @ Q - torch.eye(N, dtype=torch.float64)) / N**0.5
    foretold = torch.finfo(torch.float32).eps * triangle.growth
    assert bool(((loss < 3 * foretold) & (loss > foretold / 10)).all())
    assert triangle.loses_at_most(LOSS_TOLERANCE, torch.float32) == (smallest >= 1e-1)


def test_dependent_columns_of_one_group_have_no_triangle() -> None:
    E = columns(1.0)
    E[1, :, 3] = E[1, :, 2]
    assert cholesky(gram(E.float())) is None
