"""Rows of a factor are kept while they are few, and sketched as they come beyond."""

import pytest
import torch
from torch import Tensor

from kfdist.capture.row_store import RowStore


def rows_of(n: int, seed: int, d: int = 5) -> Tensor:
    return torch.randn(1, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_few_rows_stay_as_they_are() -> None:
    store = RowStore(7, 16, 0)
    parts = [rows_of(3, 1), rows_of(4, 2)]
    for part in parts:
        store.add(part)
    assert not store.sketched
    assert torch.equal(store.rows(), torch.cat(parts, dim=1))


def test_all_rows_stay_where_no_limit_is_set() -> None:
    store = RowStore(None, 0, 0)
    store.add(rows_of(1000, 1))
    assert not store.sketched and store.rows().shape == (1, 1000, 5)


def test_many_rows_are_never_held_at_once() -> None:
    store = RowStore(7, 16, 0)
    for seed in range(50):
        store.add(rows_of(3, seed))
        assert store.rows().shape[1] <= max(7, 16)
    assert store.sketched and store.rows().shape == (1, 16, 5)


@pytest.mark.parametrize("calls", [1, 4])
def test_the_sketch_has_the_second_moment_of_all_rows_in_expectation(calls: int) -> None:
    parts = [rows_of(12 // calls, seed) for seed in range(calls)]
    expected = sum((part.mT @ part for part in parts), torch.zeros(1, 5, 5).double())
    draws, size = 4000, 8
    mean = torch.zeros(1, 5, 5).double()
    for seed in range(draws):
        store = RowStore(2, size, 1000 * seed)
        for part in parts:
            store.add(part)
        sketch = store.rows()
        mean += sketch.mT @ sketch / draws
    # An entry deviates by at most sqrt(2/size) of the geometric mean of its diagonal entries; five times, for the mean.
    diagonal = expected.diagonal(dim1=-2, dim2=-1)
    bound = 5 * (2 / size / draws) ** 0.5 * (diagonal.unsqueeze(-1) * diagonal.unsqueeze(-2)).sqrt()
    assert bool(((mean - expected).abs() <= bound).all())
