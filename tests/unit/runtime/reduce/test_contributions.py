"""Increments of rows over ranks: exact where every slice is large enough, right in expectation where it isn't."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kfdist.comm.communicator import Communicator
from kfdist.curvature.averages import BatchStatistics, WeightedSums
from kfdist.curvature.statistics import Increment, KroneckerFactors, Needs
from kfdist.runtime.reduce import contributions as contributions_module
from kfdist.runtime.reduce.contributions import (
    Contribution,
    contribution_of_sums,
    reduce_contributions,
    with_increment,
)
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


class Doubling(Communicator):
    """Two ranks that bring the same."""

    def __init__(self) -> None:
        super().__init__(None)
        self.world_size = 2
        self.buckets: list[int] = []

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        self.buckets.append(tensor.numel())
        return tensor.mul_(2)


def of_block(name: str, dtype: torch.dtype = torch.float64) -> Contribution:
    sums = WeightedSums({"A": (1, D_A, D_A), "G": (1, D_G, D_G), "a": (1, D_A)}, dtype=dtype, device="cpu")
    found = {"A": gaussian(1, D_A, D_A, seed=ord(name)), "G": gaussian(1, D_G, D_G, seed=1)}
    found["A"] += found["A"].mT.clone()
    sums.fold(BatchStatistics({**found, "a": gaussian(1, D_A, seed=2)}, examples=3.0, positions=6.0), 0.0)
    return contribution_of_sums(name, KroneckerFactors, sums)


@pytest.mark.parametrize(("most", "buckets"), [(1 << 20, [4]), (700, [2, 2]), (1, [1, 1, 1, 1])])
def test_blocks_are_summed_in_buckets_of_bounded_size_and_kept_where_they_are_wanted(
    most: int, buckets: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contributions_module, "_BUCKET_BYTES", most)
    given, ranks = [of_block(name) for name in "wxyz"], Doubling()
    size = sum(tensor.numel() for tensor in given[0].summed.values())
    found, sent = reduce_contributions(given, ranks, wanted=lambda name: name in "xz")
    assert ranks.buckets == [number * size for number in buckets] and sent == 4 * 8 * size
    assert found.keys() == {"x", "z"}
    for each in given[1::2]:
        assert all(torch.equal(found[each.block][name], 2 * tensor) for name, tensor in each.summed.items())
    held = {tensor.untyped_storage().nbytes() for of_one in found.values() for tensor in of_one.values()}
    assert max(held) <= 8 * size, "nothing holds the memory of what isn't kept"


def test_buckets_are_of_one_dtype_and_common_tensors_come_along() -> None:
    ranks, increment = Doubling(), increments([batch(2, seed=1)])[0]
    found, _ = reduce_contributions([of_block("w"), of_block("x", torch.float32), increment], ranks, wanted=bool)
    assert len(ranks.buckets) == 3 and found["x"]["A"].dtype == torch.float32
    assert torch.equal(found["layer"]["A_rows"], 2 * increment.summed["A_rows"])
    assert torch.equal(found["layer"]["decay"], increment.common["decay"])


def test_one_rank_alone_hands_on_what_it_has() -> None:
    given = of_block("w")
    found, sent = reduce_contributions([given], Communicator(None), wanted=bool)
    assert found["w"] is given.summed and sent == sum(each.nbytes for each in given.summed.values())
