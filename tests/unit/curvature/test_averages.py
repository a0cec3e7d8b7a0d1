"""The weighted sums against the moving average written out, and what adds nothing to them."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kfdist.curvature.averages import EXAMPLES, BatchStatistics, WeightedSums, decay_at, measured, packed_statistic
from kfdist.curvature.statistics import STATISTICS
from kfdist.linalg.psd import pack_triangle
from kfdist.wire.records import from_tree

EXACT = 1e-12
"""float64: at most twenty updates, each rounding by 1e-16."""

DECAY = 0.95
C, P, Q = 2, 3, 4
SHAPES = {"A": (C, Q, Q), "G": (C, P, P)}


def batch(seed: int, n: int = 5, dtype: torch.dtype = torch.float64) -> BatchStatistics:
    """Sums over n examples of random a a^T and g g^T."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(C, n, Q, generator=generator, dtype=torch.float64)
    g = torch.randn(C, n, P, generator=generator, dtype=torch.float64)
    return BatchStatistics({"A": (a.mT @ a).to(dtype), "G": (g.mT @ g).to(dtype)}, float(n), float(n))


def empty() -> WeightedSums:
    return WeightedSums(SHAPES, dtype=torch.float64, device="cpu")


def spoiled(seed: int, value: float, factor: str = "G") -> BatchStatistics:
    made = batch(seed)
    made.sums[factor][1, 2, 0] = value
    return made


def state(sums: WeightedSums) -> list[Tensor]:
    return [tensor.clone() for tensor in (*sums.sums.values(), *sums.counts.values(), sums.dropped)]


def factors(ranks: Sequence[WeightedSums]) -> tuple[Tensor, Tensor]:
    """What the reduction of several ranks' sums gives."""
    packed = [each.packed() for each in ranks]
    summed = {name: torch.stack([each[name] for each in packed]).sum(0) for name in packed[0]}
    reduced = from_tree(packed_statistic("kronecker-factors", summed), STATISTICS)
    return reduced.A, reduced.G


def test_decay_starts_as_a_plain_average_and_ends_at_its_cap():
    assert [decay_at(k, 0.75) for k in (1, 2, 3, 4, 5, 100)] == [0.0, 0.5, 1 - 1 / 3, 0.75, 0.75, 0.75]


@settings(max_examples=30)
@given(st.integers(1, 20), st.sampled_from([0.0, 0.5, 0.95]))
def test_equal_batches_equal_the_moving_average(updates: int, decay: float):
    """Written out: M_k = rho_k M_{k-1} + (1 - rho_k) x_k, rho_k = min(1 - 1/k, decay) (algorithms.md 0.3)."""
    sums = empty()
    A, G = torch.zeros(C, Q, Q, dtype=torch.float64), torch.zeros(C, P, P, dtype=torch.float64)
    for k in range(1, updates + 1):
        rho = min(1 - 1 / k, decay)
        new = batch(k)
        A, G = rho * A + (1 - rho) * new.sums["A"] / 5, rho * G + (1 - rho) * new.sums["G"] / 5
        sums.fold(new, decay_at(k, decay))
    actual = factors([sums])
    torch.testing.assert_close(actual[0], A, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(actual[1], G, rtol=EXACT, atol=EXACT)


def test_the_first_update_overwrites():
    sums = empty()
    sums.sums["A"].fill_(7.0)
    sums.counts[EXAMPLES].fill_(3.0)
    sums.fold(batch(0), decay_at(1, DECAY))
    torch.testing.assert_close(factors([sums])[0], batch(0).sums["A"] / 5, rtol=EXACT, atol=EXACT)


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=1, max_size=6))
def test_ranks_with_batches_of_any_length_give_the_weighted_mean_of_all_examples(lengths: list[list[int]]):
    """Zero stands for no batch. Written out: sum of (weight x example) over sum of weights, over ranks and updates."""
    ranks = [empty() for _ in range(3)]
    numerator, denominator = torch.zeros(C, P, P, dtype=torch.float64), 0.0
    for k, of_ranks in enumerate(lengths, start=1):
        rho = decay_at(k, DECAY)
        numerator, denominator = rho * numerator, rho * denominator
        for rank, n in enumerate(of_ranks):
            new = batch(10 * k + rank, n) if n else None
            ranks[rank].fold(new, rho)
            if new is not None:
                numerator, denominator = numerator + (1 - rho) * new.sums["G"], denominator + (1 - rho) * n
    weight = float(sum(each.counts[EXAMPLES] for each in ranks))
    assert weight == pytest.approx(denominator, rel=EXACT)
    if denominator:
        torch.testing.assert_close(factors(ranks)[1], numerator / denominator, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("factor", ["A", "G"])
def test_a_batch_that_is_not_finite_counts_as_none(value: float, factor: str):
    sums, without = empty(), empty()
    for k, (new, other) in enumerate(
        [(batch(1), batch(1)), (spoiled(2, value, factor), None), (batch(3), batch(3))], 1
    ):
        sums.fold(new, decay_at(k, DECAY))
        without.fold(other, decay_at(k, DECAY))
    assert all(torch.equal(a, b) for a, b in zip(state(sums)[:-1], state(without)[:-1], strict=True))
    assert sums.dropped == 1
    assert without.dropped == 0


def test_infinities_of_both_signs_do_not_cancel():
    both = spoiled(1, torch.inf)
    both.sums["G"][0, 0, 0] = -torch.inf
    sums = empty()
    sums.fold(both, 0.0)
    assert not measured(sums.counts)
    assert sums.dropped == 1


def test_a_dropped_batch_leaves_nothing_in_empty_sums():
    sums = empty()
    sums.fold(spoiled(1, torch.nan), decay_at(1, DECAY))
    assert not measured(sums.counts)
    assert not sums.sums["A"].any() and not sums.sums["G"].any()


@pytest.mark.parametrize("new", [batch(2), spoiled(2, torch.nan), None], ids=["finite", "spoiled", "absent"])
def test_a_skipped_step_changes_no_sum(new: BatchStatistics | None):
    sums = empty()
    sums.fold(batch(1), 0.0)
    before = state(sums)
    sums.fold(new, 0.5, step_is_finite=torch.tensor(False))
    assert all(torch.equal(a, b) for a, b in zip(state(sums)[:-1], before[:-1], strict=True))


def test_a_step_that_is_finite_folds_as_without_the_question():
    sums, plain = empty(), empty()
    for k in (1, 2, 3):
        sums.fold(batch(k), decay_at(k, DECAY), step_is_finite=torch.tensor(True))
        plain.fold(batch(k), decay_at(k, DECAY))
    assert all(torch.equal(a, b) for a, b in zip(state(sums), state(plain), strict=True))


def test_the_first_batch_becomes_the_average_and_takes_no_memory_beside_it():
    """Of the first step's sums there would else be two of each."""
    first, sums = batch(1), empty()
    kept = {name: total.clone() for name, total in first.sums.items()}
    sums.fold(first, 0.0)
    for name, total in sums.sums.items():
        assert total.data_ptr() == first.sums[name].data_ptr() and torch.equal(total, kept[name])
    second = batch(2)
    sums.fold(second, 0.5)
    assert all(torch.equal(sums.sums[name], 0.5 * kept[name] + 0.5 * second.sums[name]) for name in kept)


def test_a_first_batch_that_is_part_of_another_tensor_is_copied():
    first, sums = batch(1), empty()
    whole = torch.cat([first.sums["A"], first.sums["A"]])
    first.sums["A"] = whole[:C]
    sums.fold(first, 0.0)
    sums.fold(batch(2), 0.5)
    assert torch.equal(whole[:C], whole[C:]) and not torch.equal(sums.sums["A"], whole[:C])


def test_a_first_batch_that_others_still_look_at_stays_as_it_is():
    first, sums = batch(1), empty()
    first.sums["A"][..., 0, 0] = torch.nan
    sums.fold(first, 0.0, takes_over=False)
    assert not first.sums["A"].isfinite().all() and bool((sums.sums["A"] == 0).all())


def test_float32_batches_go_into_float64_sums():
    sums = empty()
    sums.fold(batch(1, dtype=torch.float32), 0.0)
    assert sums.sums["A"].dtype == torch.float64
    torch.testing.assert_close(factors([sums])[0], batch(1).sums["A"] / 5, rtol=1e-6, atol=1e-6)


def test_only_the_lower_triangle_travels():
    sums = empty()
    sums.fold(batch(1), 0.0)
    A, G, *counts = sums.packed().values()
    assert (A.shape, G.shape) == ((C, Q * (Q + 1) // 2), (C, P * (P + 1) // 2))
    assert [tuple(each.shape) for each in counts] == [(1,), (1,)]
    assert torch.equal(A, pack_triangle(sums.sums["A"]))


def test_folding_never_asks_for_a_value():
    """A meta tensor has none: whatever would wait for a device raises here."""
    device = torch.device("meta")
    sums = WeightedSums(SHAPES, dtype=torch.float32, device=device)
    new = BatchStatistics({name: torch.empty(shape, device=device) for name, shape in SHAPES.items()}, 5.0, 5.0)
    sums.fold(new, 0.5, step_is_finite=torch.empty((), dtype=torch.bool, device=device))
    sums.fold(None, 0.5)
    assert [tuple(each.shape) for each in sums.packed().values()] == [(C, 10), (C, 6), (1,), (1,)]
