"""Sums of outer products with fewer columns."""

import pytest
import torch
from torch import Tensor

from kfdist.linalg.compression import compress_columns
from tests.support.matrices import gaussian, relative_error


def total(a: Tensor, g: Tensor) -> Tensor:
    return g.mT @ a


def columns_with(values: Tensor, *, t: int, p: int, q: int) -> tuple[Tensor, Tensor]:
    """Returns columns of `[2, 3]` sums whose singular values are `values`."""
    left = torch.linalg.qr(gaussian(2, 3, p, len(values), seed=1)).Q
    right = torch.linalg.qr(gaussian(2, 3, q, len(values), seed=2)).Q
    mixing = torch.linalg.qr(gaussian(2, 3, t, len(values), seed=3)).Q
    return (right * values @ mixing.mT).mT, (left @ mixing.mT).mT


@pytest.mark.parametrize(
    ("t", "p", "q", "columns", "expected"),
    [(4, 9, 7, 4, 4), (3, 9, 7, 4, 3), (20, 4, 7, 4, 4), (20, 9, 3, 4, 3), (20, 3, 2, 16, 2)],
)
def test_exact_where_one_side_is_no_wider_than_the_columns(t: int, p: int, q: int, columns: int, expected: int) -> None:
    a, g = gaussian(2, 3, t, q, seed=1), gaussian(2, 3, t, p, seed=2)
    new_a, new_g = compress_columns(a, g, columns)
    assert new_a.shape == (2, 3, expected, q)
    assert new_g.shape == (2, 3, expected, p)
    assert relative_error(total(new_a, new_g), total(a, g)) <= 1e-13


@pytest.mark.parametrize(("p", "q"), [(12, 30), (30, 12), (13, 13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_where_the_rank_is_no_more_than_the_columns(p: int, q: int, dtype: torch.dtype) -> None:
    a, g = columns_with(torch.tensor([5.0, 2.0, 1e-2, 1e-3], dtype=torch.float64), t=40, p=p, q=q)
    new_a, new_g = compress_columns(a.to(dtype), g.to(dtype), 4)
    assert new_a.shape[2] == new_g.shape[2] == 4
    assert relative_error(total(new_a, new_g), total(a, g)) <= (1e-13 if dtype is torch.float64 else 1e-6)


@pytest.mark.parametrize(("p", "q"), [(12, 30), (30, 12)])
def test_near_the_best_truncation(p: int, q: int) -> None:
    flat = torch.linspace(1.0, 0.5, 10, dtype=torch.float64)
    gap = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.1, 0.1, 0.05], dtype=torch.float64)
    for values, excess in ((flat, 0.05), (gap, 1e-6)):
        a, g = columns_with(values, t=40, p=p, q=q)
        found = total(*compress_columns(a, g, 4))
        best = float(values[4:].norm())
        errors = (found - total(a, g)).flatten(2).norm(dim=-1)
        assert float(errors.max()) <= (1 + excess) * best
        assert float(errors.min()) >= best * (1 - 1e-9)


def test_zeros_stay_zeros_and_the_result_is_reproducible() -> None:
    a, g = gaussian(1, 2, 9, 8, seed=1), gaussian(1, 2, 9, 8, seed=2)
    a[:, 1] = 0
    g[:, 1] = 0
    torch.manual_seed(0)
    first = compress_columns(a, g, 3)
    torch.manual_seed(1)
    second = compress_columns(a, g, 3)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert not total(*first)[:, 1].any()
