"""Samples of indices, and whitened Gram matrices."""

import torch

from kfdist.linalg.row_products import sampled_first, square_norms, whiten_gram
from tests.support.matrices import gaussian, relative_error, with_spectrum

CPU = torch.device("cpu")


def test_the_sample_stands_first_and_everything_is_there_once() -> None:
    order = sampled_first(50, 8, seed=3, device=CPU)
    assert torch.equal(order.sort().values, torch.arange(50))
    assert torch.equal(order[:8], order[:8].sort().values)
    assert torch.equal(order[8:], order[8:].sort().values)
    assert torch.equal(order, sampled_first(50, 8, seed=3, device=CPU))
    assert not torch.equal(order, sampled_first(50, 8, seed=4, device=CPU))


def test_every_index_is_drawn_equally_often() -> None:
    draws = 2000
    counts = torch.zeros(10)
    for seed in range(draws):
        counts[sampled_first(10, 3, seed=seed, device=CPU)[:3]] += 1
    spread = (draws * 0.3 * 0.7) ** 0.5
    assert float((counts - 0.3 * draws).abs().max()) < 4 * spread


def test_whitened_rows_are_orthonormal_and_missing_rank_is_zero() -> None:
    rows = gaussian(2, 6, 20, seed=1)
    rows[1, 4:] = rows[1, :2]
    values, whitening = whiten_gram(rows @ rows.mT)
    assert values.shape == (2, 6)
    assert bool((values[0] > 0).all()) and not values[1, 4:].any() and not whitening[1, :, 4:].any()
    R = whitening.mT @ rows
    expected = torch.eye(6, dtype=torch.float64).repeat(2, 1, 1)
    expected[1, 4:] = 0
    assert relative_error(R @ R.mT, expected) <= 1e-12
    assert relative_error(R.mT @ (values.unsqueeze(-1) * R), rows.mT @ rows) <= 1e-12


def test_rounding_is_not_taken_for_rank() -> None:
    values, whitening = whiten_gram(with_spectrum(torch.tensor([[4.0, 1.0, 1e-20, -1e-18]]), seed=1))
    assert values.shape == (1, 2)
    assert whitening.shape == (1, 4, 2)
    values, whitening = whiten_gram(torch.zeros(2, 3, 3, dtype=torch.float64))
    assert (values.shape, whitening.shape) == ((2, 0), (2, 3, 0))


def test_square_norms() -> None:
    a, g = gaussian(2, 5, 3, 4, seed=1), gaussian(2, 5, 3, 6, seed=2)
    assert relative_error(square_norms(a, g), (g.mT @ a).square().sum((-2, -1))) <= 1e-13
