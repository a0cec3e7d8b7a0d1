"""Sums kept as rows, against their products."""

import pytest
import torch
from torch import Tensor

from kfdist.curvature.averages import BatchStatistics, WeightedSums
from kfdist.curvature.thin_sums import ThinRows, ThinSum

C, D = 2, 6
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def rows(seed: int, count: int = 2, width: int = D) -> Tensor:
    return torch.randn(C, count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sums() -> WeightedSums:
    return WeightedSums({"A": (C, D, D)}, dtype=torch.float64, device="cpu")


def batch(thin: list[ThinRows]) -> BatchStatistics:
    return BatchStatistics({}, 3.0, 3.0, thin={"A": thin})


def dense(thin: list[ThinRows]) -> Tensor:
    """The sum of the products, each row written out."""
    total = torch.zeros(C, D, D, dtype=torch.float64)
    for each in thin:
        full = torch.zeros(C, each.rows.shape[1], D, dtype=torch.float64)
        full[..., slice(None) if each.columns is None else each.columns] = each.rows
        total += full.mT @ full
    return total


BATCHES = (
    [ThinRows(rows(1))],
    [ThinRows(rows(2)), ThinRows(rows(3, 1))],
    [ThinRows(rows(4, 5, 3), torch.tensor([1, 2, 5])), ThinRows(rows(5))],
)


@pytest.mark.parametrize("finite", [None, torch.tensor(True)], ids=["", "told"])
def test_rows_fold_like_their_products(finite: Tensor | None):
    thin, plain = sums(), sums()
    for step, each in enumerate(BATCHES):
        thin.fold(batch(each), 0.9 * (step > 0), finite)
        plain.fold(BatchStatistics({"A": dense(each)}, 3.0, 3.0), 0.9 * (step > 0), finite)
    torch.testing.assert_close(thin.sums["A"], plain.sums["A"], **EXACT)
    assert all(torch.equal(thin.counts[name], plain.counts[name]) for name in thin.counts)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e200])
def test_rows_that_are_not_finite_or_overflow_count_as_none(value: float):
    spoiled = rows(6)
    spoiled[1, 0, 2] = value
    one, other = sums(), sums()
    for each in (one, other):
        each.fold(batch(BATCHES[0]), 0.0)
    one.fold(batch([ThinRows(spoiled)]), 0.5)
    other.fold(None, 0.5)
    assert torch.equal(one.sums["A"], other.sums["A"])
    assert one.dropped == 1


def test_a_skipped_step_changes_nothing():
    one = sums()
    one.fold(batch(BATCHES[0]), 0.0)
    before = one.sums["A"].clone()
    one.fold(batch(BATCHES[1]), 0.5, torch.tensor(False))
    assert torch.equal(one.sums["A"], before)


def test_many_rows_become_a_sum_and_few_stay_rows():
    few, many = ThinSum(D), ThinSum(D)
    few.add(ThinRows(rows(1)))
    assert few.rows is not None
    for each in BATCHES:
        for some in each:
            many.add(some)
    assert many.rows is None
    torch.testing.assert_close(many.add_to_sum(), sum(map(dense, BATCHES)), **EXACT)
    start = torch.ones(C, D, D, dtype=torch.float64)
    torch.testing.assert_close(few.add_to_sum(start), 1 + dense(BATCHES[0]), **EXACT)


def test_only_the_columns_that_ever_come_are_touched_until_others_do():
    """Of 3 x 3 places over maps of 1 x 1 one in nine columns meets a pixel."""
    some, others = slice(1, None, 3), slice(0, None, 3)
    batches = [[ThinRows(rows(k, 3, 2), some)] for k in (1, 2)] + [[ThinRows(rows(3, 3, 2), others)], BATCHES[0]]
    thin, plain = sums(), sums()
    for step, each in enumerate(batches):
        thin.fold(batch(each), 0.9 * (step > 0))
        plain.fold(BatchStatistics({"A": dense(each)}, 3.0, 3.0), 0.9 * (step > 0))
        torch.testing.assert_close(thin.sums["A"], plain.sums["A"], **EXACT)
