"""Sums that are packed when they are asked for, or before they change: never otherwise, and always of their moment."""

import gc

import pytest
import torch
from torch import Tensor

from kfdist.curvature import late_sums
from kfdist.curvature.averages import BatchStatistics, WeightedSums, means, packed_statistic
from kfdist.curvature.late_sums import LateSums
from kfdist.curvature.statistics import STATISTICS
from kfdist.curvature.thin_sums import ThinRows
from kfdist.linalg.psd import pack_triangle, sum_of_products
from kfdist.wire.records import from_tree

C, P, Q = 2, 3, 4
SHAPES = {"A": (C, Q, Q), "G": (C, P, P), "a": (C, Q)}


def batch(seed: int) -> BatchStatistics:
    generator = torch.Generator().manual_seed(seed)
    a, g = (torch.randn(C, 5, d, generator=generator) for d in (Q, P))
    return BatchStatistics({"A": a.mT @ a, "G": g.mT @ g, "a": a.sum(1)}, 5.0, 10.0)


def folded(*seeds: int) -> WeightedSums:
    sums = WeightedSums(SHAPES, dtype=torch.float32, device="cpu")
    for number, seed in enumerate(seeds):
        sums.fold(batch(seed), 0.5 if number else 0.0)
    return sums


def handed_out(sums: WeightedSums) -> LateSums:
    found = sums.late()
    assert isinstance(found, LateSums)
    return found


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("seeds", [(), (1,), (1, 2)])
def test_they_are_what_would_have_been_packed_at_once_whatever_changes_later(seeds: tuple[int, ...]) -> None:
    sums = folded(*seeds)
    before, late = copies(sums.packed()), handed_out(sums)
    other = folded(7).state_dict()
    for change in (lambda: sums.fold(batch(3), 0.0), lambda: sums.fold(None, 0.5), lambda: sums.load_state_dict(other)):
        change()
        assert list(late) == list(before) and len(late) == len(before)
        assert all(torch.equal(late[name], before[name]) for name in before)
        assert {name: tuple(tensor.shape) for name, tensor in before.items()} == dict(late.shapes)


def test_they_are_packed_once_asked_for_and_not_when_nobody_wants_them_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sums, packed = folded(1), []
    pack = late_sums.pack_triangle
    monkeypatch.setattr(late_sums, "pack_triangle", lambda *given, **named: packed.append(1) or pack(*given, **named))
    late = handed_out(sums)
    assert "A" in late and "B" not in late and late.on_host and not packed
    _ = late["A"]
    assert len(packed) == 1
    del late
    gc.collect()
    sums.fold(batch(2), 0.5)
    assert len(packed) == 1
    kept = handed_out(sums)
    sums.fold(batch(3), 0.5)
    sums.fold(batch(4), 0.5)
    assert len(packed) == 3, "both triangles, before the first of the two foldings"
    assert kept["A"].data_ptr() == kept["A"].data_ptr()


@pytest.mark.parametrize("frozen", [False, True])
def test_means_of_them_are_those_of_the_packed_sums_and_leave_them_as_they_are(frozen: bool) -> None:
    sums = folded(1, 2)
    before, late = copies(sums.packed()), handed_out(sums)
    if frozen:
        late.freeze()
    found, expected = means(late), means(before)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert all(torch.equal(late[name], before[name]) for name in before)
    places = {name: torch.full((tensor.numel(),), torch.nan) for name, tensor in before.items()}
    for name, place in places.items():
        late.put(name, place)
        assert torch.equal(place, before[name].reshape(-1))


def test_before_the_first_batch_there_is_no_memory_and_everything_is_zero() -> None:
    sums = folded()
    assert all(total.untyped_storage().nbytes() == 4 for total in sums.sums.values())
    sums.fold(None, 0.0)
    assert all(total.untyped_storage().nbytes() == 4 and not total.any() for total in sums.sums.values())
    state, other = sums.state_dict(), folded()
    other.load_state_dict(state)
    assert not any(tensor.any() for tensor in (*state.values(), *other.packed().values()))
    other.fold(batch(1), 0.5)
    assert torch.equal(other.sums["A"], 0.5 * batch(1).sums["A"])


@pytest.mark.parametrize("finite", [True, False])
def test_a_first_batch_is_taken_over_also_where_the_device_decides_whether_it_counts(finite: bool) -> None:
    sums, first = folded(), batch(1)
    sums.fold(first, 0.0, step_is_finite=torch.tensor(finite))
    assert all(total.data_ptr() == first.sums[name].data_ptr() for name, total in sums.sums.items())
    expected = batch(1).sums
    for name, total in sums.sums.items():
        assert torch.equal(total, expected[name] if finite else torch.zeros_like(total))


WIDE = 64


def thin_sums(rows: Tensor, columns: Tensor | None = None) -> WeightedSums:
    sums = WeightedSums({"A": (1, WIDE, WIDE), "G": (1, 8, 8)}, dtype=torch.float32, device="cpu")
    sums.fold(BatchStatistics({"G": torch.eye(8)[None]}, 5.0, 10.0, thin={"A": [ThinRows(rows, columns)]}), 0.0)
    return sums


@pytest.mark.parametrize("columns", [None, torch.arange(3, 23)], ids=["all", "some"])
@pytest.mark.parametrize("later", [False, True])
def test_a_sum_of_few_rows_travels_as_these_whatever_changes_later(columns: Tensor | None, later: bool) -> None:
    rows = torch.randn(1, 6, WIDE if columns is None else len(columns), generator=torch.Generator().manual_seed(0))
    sums = thin_sums(rows, columns)
    wanted = sums.sums["A"] / 5.0
    late = handed_out(sums)
    if later:
        sums.fold(BatchStatistics({"G": torch.eye(8)[None]}, 5.0, 10.0, thin={"A": [ThinRows(rows, columns)]}), 0.5)
    tree = packed_statistic("kronecker-factors", late)
    assert tree["fields"]["A"]["rows"].shape == (1, 6, WIDE)
    read = from_tree(tree, STATISTICS)
    torch.testing.assert_close(read.A, wanted)
    assert torch.equal(read.A, read.A.mT)
    torch.testing.assert_close(read.G, torch.eye(8)[None] / 10.0)
    torch.testing.assert_close(late["A"], pack_triangle(5.0 * wanted))
    place = torch.empty(late.shapes["A"]).view(-1)
    late.put("A", place)
    torch.testing.assert_close(place, pack_triangle(5.0 * wanted).view(-1))


@pytest.mark.parametrize("frozen", [False, True])
def test_no_bit_of_a_sum_of_two_pieces_depends_on_when_it_is_asked_for(frozen: bool) -> None:
    sums = WeightedSums({"A": (1, WIDE, WIDE)}, dtype=torch.float32, device="cpu")
    pieces = [torch.randn(1, 4, WIDE, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    sums.fold(BatchStatistics({}, 5.0, 10.0, thin={"A": [ThinRows(each) for each in pieces]}), 0.0)
    late = handed_out(sums)
    assert late.rows["A"].shape == (1, 8, WIDE)
    if frozen:
        late.freeze()
    place = torch.empty(late.shapes["A"]).view(-1)
    late.put("A", place)
    expected = pack_triangle(sum_of_products(late.rows["A"]))
    assert torch.equal(place, expected.view(-1))
    assert torch.equal(late["A"], expected) and torch.equal(late.own("A"), expected)


def test_a_sum_of_many_rows_or_of_two_batches_or_one_that_was_loaded_travels_as_a_triangle() -> None:
    few, many = (torch.randn(1, count, WIDE, generator=torch.Generator().manual_seed(1)) for count in (6, 9))
    assert not handed_out(thin_sums(many)).rows
    twice, loaded = thin_sums(few), thin_sums(few)
    twice.fold(BatchStatistics({"G": torch.eye(8)[None]}, 5.0, 10.0, thin={"A": [ThinRows(few)]}), 0.5)
    loaded.load_state_dict(loaded.state_dict())
    assert handed_out(thin_sums(few)).rows and not handed_out(twice).rows and not handed_out(loaded).rows
