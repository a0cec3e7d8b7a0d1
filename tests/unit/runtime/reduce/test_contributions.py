"""Increments of rows over ranks: exact where every slice is large enough, right in expectation where it isn't."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kfdist.curvature.averages import BatchStatistics
from kfdist.curvature.statistics import Increment, Needs
from kfdist.runtime.reduce.contributions import Contribution, with_increment
from tests.support.matrices import gaussian

D_A, D_G, ROWS = 5, 4, 8
NEEDS = Needs(sums=frozenset(), increments=frozenset({"A", "G"}), increment_rows=ROWS)
LIKE = torch.zeros((), dtype=torch.float64)


def batch(m: int, *, seed: int, spoiled: float | None = None) -> BatchStatistics:
    rows = {"A": gaussian(1, m, D_A, seed=2 * seed), "G": gaussian(1, m, D_G, seed=2 * seed + 1)}
    if spoiled is not None:
        rows["G"][0, 0, 0] = spoiled
    return BatchStatistics(sums={}, examples=float(m), positions=3.0 * m, rows=rows)


def increments(
    batches: Sequence[BatchStatistics | None], *, rho: float = 0.75, seed: int = 0, finite: Tensor | None = None
) -> list[Contribution]:
    """What each rank brings."""
    return [
        with_increment(
            Contribution(block="layer", statistic=Increment, summed={}, like=LIKE),
            NEEDS,
            {"A": (1, D_A), "G": (1, D_G)},
            each,
            rho=rho,
            step_is_finite=finite,
            like=LIKE,
            rank=rank,
            world_size=len(batches),
            seed=1000 * seed + rank,
        )
        for rank, each in enumerate(batches)
    ]


def summed(contributions: list[Contribution], name: str) -> Tensor:
    return torch.stack([each.summed[name] for each in contributions]).sum(0)


def second_moment(contributions: list[Contribution], name: str) -> Tensor:
    rows = summed(contributions, f"{name}_rows")
    assert rows.shape[1] == ROWS
    return rows.mT @ rows


def truth(batches: Sequence[BatchStatistics | None], name: str, gain: float) -> Tensor:
    return gain * torch.stack([each.rows[name].mT @ each.rows[name] for each in batches if each is not None]).sum(0)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_rows_that_fit_their_slices_are_the_union(world_size: int) -> None:
    batches = [batch(ROWS // world_size - rank % 2, seed=rank) for rank in range(world_size)]
    found = increments(batches)
    for name in "AG":
        torch.testing.assert_close(second_moment(found, name), truth(batches, name, 0.25), rtol=1e-12, atol=1e-12)
    examples = 0.25 * sum(each.examples for each in batches)
    assert summed(found, "examples").item() == pytest.approx(examples)
    assert summed(found, "positions").item() == pytest.approx(3 * examples)
    assert all(each.common["decay"].item() == 0.75 for each in found)


def test_absent_and_spoiled_batches_add_nothing() -> None:
    batches = [batch(2, seed=0), None, batch(2, seed=1, spoiled=torch.inf), batch(9, seed=2, spoiled=torch.nan)]
    found = increments(batches)
    for name in "AG":
        torch.testing.assert_close(second_moment(found, name), truth(batches[:1], name, 0.25), rtol=1e-12, atol=1e-12)
    assert summed(found, "examples").item() == 0.5


def test_a_skipped_step_changes_nothing() -> None:
    found = increments([batch(3, seed=0), batch(3, seed=1)], finite=torch.tensor(False))
    assert not any(summed(found, name).any() for name in ("A_rows", "G_rows", "examples", "positions"))
    assert all(each.common["decay"].item() == 1.0 for each in found)


def test_sketched_rows_have_the_second_moment_of_the_union_in_expectation() -> None:
    """Two ranks have more rows than fit, one doesn't and fills its slice, one has none."""
    batches = [batch(12, seed=0), batch(3, seed=1), batch(2, seed=2), None]
    draws = 600
    for name in "AG":
        found = torch.stack([second_moment(increments(batches, seed=seed), name) for seed in range(draws)])
        error = found.std(0) / draws**0.5
        assert float(found.std(0).max()) > 0
        assert ((found.mean(0) - truth(batches, name, 0.25)).abs() <= 5 * error).all()
