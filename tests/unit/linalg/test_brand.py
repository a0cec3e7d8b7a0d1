"""Brand's update, its truncation, repair and correction, and sketched rows, against dense float64 truth."""

import math

import pytest
import torch
from torch import Tensor

from kfdist.curvature.references import leading_part
from kfdist.linalg import lowrank
from kfdist.linalg.brand import (
    brand_update,
    draw_columns,
    light_correction,
    orthogonality_error,
    reorthogonalise,
    solve_rows,
    update_errors,
)
from kfdist.linalg.kronecker import FactoredInverse, Spectrum
from kfdist.linalg.lowrank import sketch_rows
from kfdist.linalg.psd import eigh_descending
from tests.support.matrices import gaussian, relative_error, with_spectrum

C, D = 2, 40


def empty(d: int = D, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.zeros(C, d, 0, dtype=dtype), torch.zeros(C, 0, dtype=dtype)


def dense(vectors: Tensor, values: Tensor) -> Tensor:
    return vectors @ torch.diag_embed(values) @ vectors.mT


def some_state(r: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    vectors = torch.linalg.qr(gaussian(C, D, r, seed=seed)).Q
    return vectors, torch.linspace(3.0, 0.1, r, dtype=torch.float64).expand(C, r).contiguous()


def test_b1_untruncated_updates_from_nothing_equal_the_dense_moving_average() -> None:
    vectors, values = empty()
    average = torch.zeros(C, D, D, dtype=torch.float64)
    for k in range(6):
        rows = gaussian(C, 5, D, seed=k)
        average = 0.9 * average + 0.1 * rows.mT @ rows
        vectors, values = brand_update(vectors, 0.9 * values, 0.1**0.5 * rows)
        assert vectors.shape == (C, D, 5 * (k + 1))
    assert relative_error(dense(vectors, values), average) <= 1e-12
    assert float(orthogonality_error(vectors).max()) <= 1e-12
    assert bool((values.diff() <= 0).all())


def test_b2_one_update_of_a_truncated_state_is_exact() -> None:
    vectors, values = some_state(8)
    rows = gaussian(C, 6, D, seed=1)
    found = brand_update(vectors, 0.95 * values, 0.05**0.5 * rows)
    assert relative_error(dense(*found), 0.95 * dense(vectors, values) + 0.05 * rows.mT @ rows) <= 1e-12


def test_cut_off_after_the_update_it_is_the_best_approximation_of_its_rank() -> None:
    vectors, values = some_state(8)
    rows = gaussian(C, 6, D, seed=1)
    updated, kept = brand_update(vectors, values, rows)
    expected = leading_part(dense(vectors, values) + rows.mT @ rows, 8, continued=False)
    assert relative_error(dense(updated[..., :8], kept[..., :8]), expected) <= 1e-12


def degenerate_rows(kind: str, vectors: Tensor) -> Tensor:
    rows = gaussian(C, 6, D, seed=2)
    if kind == "zero":
        return torch.zeros_like(rows)
    if kind == "some zero":
        rows[:, 2:] = 0
    if kind == "all the same":
        rows[:] = rows[:, :1]
    if kind == "duplicates":
        rows[:, 3:] = rows[:, :3]
    if kind == "within the span":
        rows = gaussian(C, 6, vectors.shape[-1], seed=4) @ vectors.mT
    if kind == "nearly within the span":
        rows = gaussian(C, 6, vectors.shape[-1], seed=4) @ vectors.mT + 1e-12 * rows
    if kind == "zero in one group":
        rows[0] = 0
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("basis", ["dense", "unit vectors"])
@pytest.mark.parametrize(
    "kind",
    ["zero", "some zero", "all the same", "duplicates", "within the span", "nearly within the span"]
    + ["zero in one group"],
)
def test_degenerate_rows_leave_the_basis_orthonormal(kind: str, basis: str, dtype: torch.dtype) -> None:
    """With unit vectors, what a QR of E alone fills up with lies within the span of U."""
    vectors, values = some_state(8)
    if basis == "unit vectors":
        vectors = torch.eye(D, dtype=torch.float64)[:, :8].expand(C, D, 8).contiguous()
    rows = degenerate_rows(kind, vectors)
    found = brand_update(vectors.to(dtype), values.to(dtype), rows.to(dtype))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert float(orthogonality_error(found[0]).max()) <= tolerance
    assert relative_error(dense(*found), dense(vectors, values) + rows.mT @ rows) <= tolerance
    assert float(found[1].min()) >= 0


def widths_of_qr(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that grows by the number of columns of each QR decomposition from now on."""
    widths: list[int] = []
    qr = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda matrix: widths.append(matrix.shape[-1]) or qr(matrix))
    return widths


def test_the_second_pass_makes_rows_near_the_span_orthogonal_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass would leave E with 1e-16/1e-8 of U in it."""
    vectors, values = some_state(8)
    rows = gaussian(C, 6, 8, seed=4) @ vectors.mT + 1e-8 * gaussian(C, 6, D, seed=2)
    widths = widths_of_qr(monkeypatch)
    found = brand_update(vectors, values, rows)
    assert widths == []  # neither has it been seen afterwards, and mended by reflections
    assert float(orthogonality_error(found[0]).max()) <= 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("smallest", [1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-9])
def test_directions_of_any_length_leave_the_basis_orthonormal(
    smallest: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products alone, where they are good enough, and else reflections, which a QR decomposition tells."""
    vectors, values = some_state(8)
    turn = torch.linalg.qr(gaussian(C, 16, 16, seed=7)).Q
    lengths = torch.logspace(0, math.log10(smallest), 16, dtype=torch.float64)
    rows = turn @ (lengths[:, None] * torch.linalg.qr(gaussian(C, D, 16, seed=2)).Q.mT)
    widths = widths_of_qr(monkeypatch)
    found = brand_update(vectors.to(dtype), values.to(dtype), rows.to(dtype))
    if dtype == torch.float32 and smallest in (1e-1, 1e-9):
        assert bool(widths) == (smallest == 1e-9)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    assert float(orthogonality_error(found[0]).max()) <= tolerance
    assert relative_error(dense(*found), dense(vectors, values) + rows.mT @ rows) <= tolerance


@pytest.mark.parametrize(("kind", "columns"), [("duplicates", 3), ("all the same", 1), ("zero", 0)])
def test_rows_that_depend_on_others_add_no_columns_and_take_no_reflections(
    kind: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32. In float64 products can't tell such rows from those that differ by less than 1e-8."""
    vectors, values = some_state(8)
    widths = widths_of_qr(monkeypatch)
    found, _ = brand_update(vectors.float(), values.float(), degenerate_rows(kind, vectors).float())
    assert widths == []
    assert found.shape == (C, D, 8 + columns)


def test_groups_that_differ_in_their_directions_share_the_larger_number() -> None:
    vectors, values = some_state(8)
    rows = gaussian(C, 6, D, seed=2)
    rows[0, 3:] = rows[0, :3]
    found = brand_update(vectors, values, rows)
    assert found[0].shape == (C, D, 14)
    assert float(orthogonality_error(found[0]).max()) <= 1e-12
    assert relative_error(dense(*found), dense(vectors, values) + rows.mT @ rows) <= 1e-12


def test_more_columns_than_dimensions_are_refused() -> None:
    vectors, values = some_state(36)
    with pytest.raises(ValueError, match="rank 36 and 5 rows don't fit into 40 dimensions"):
        brand_update(vectors, values, gaussian(C, 5, D, seed=0))


def test_float32_stays_orthonormal_over_two_hundred_updates() -> None:
    d, r, n = 120, 20, 16
    average = torch.zeros(C, d, d, dtype=torch.float64)
    vectors, values = empty(d, torch.float32)
    scale = 0.7 ** torch.arange(d, dtype=torch.float64)
    for k in range(200):
        rows = gaussian(C, n, d, seed=k) * scale
        average = 0.95 * average + 0.05 * rows.mT @ rows
        vectors, values = brand_update(vectors[..., :r], 0.95 * values[..., :r], (0.05**0.5 * rows).float())
        assert float(orthogonality_error(vectors).max()) < 1e-4
    assert relative_error(dense(vectors, values), average) < 1e-3  # 0.7^20: what is cut off is below it


def test_probes_see_a_wrong_update_and_a_spoiled_basis() -> None:
    before, rows = some_state(8), gaussian(C, 6, D, seed=1)
    U, w = brand_update(*before, rows)
    probes = gaussian(C, D, 4, seed=9)
    residual, orthogonality = update_errors(before, rows, (U, w), probes)
    assert max(float(residual.max()), float(orthogonality.max())) <= 1e-12
    residual, orthogonality = update_errors(before, rows, (U, w * torch.where(torch.arange(14) == 0, 1.1, 1.0)), probes)
    assert float(residual.min()) > 1e-2
    assert float(orthogonality.max()) <= 1e-12
    residual, orthogonality = update_errors(before, rows, (U + 0.01 * U.roll(1, -1), w), probes)
    assert float(orthogonality.min()) > 1e-3
    nothing = torch.zeros(C, 6, D, dtype=torch.float64)
    zero = (before[0], torch.zeros_like(before[1]))
    assert float(update_errors(zero, nothing, brand_update(*zero, nothing), probes)[0].max()) == 0.0


def test_a_spoiled_basis_is_orthonormal_again_and_stands_for_the_same_matrix() -> None:
    vectors, values = some_state(8)
    spoiled = vectors + 0.05 * gaussian(C, D, 8, seed=6)
    spoiled[..., 3] = spoiled[..., 2]
    found = reorthogonalise(spoiled, values)
    assert float(orthogonality_error(spoiled).min()) > 0.1
    assert float(orthogonality_error(found[0]).max()) <= 1e-12
    assert relative_error(dense(*found), dense(spoiled, values)) <= 1e-12
    assert bool((found[1].diff() <= 0).all())


@pytest.mark.parametrize("m", [1, 3, 8])
def test_b4_a_correction_never_moves_away_from_the_matrix(m: int) -> None:
    matrix = with_spectrum((0.8 ** torch.arange(D)).expand(C, D), seed=8)
    vectors, values = some_state(8)
    for seed in range(20):
        before = (matrix - dense(vectors, values)).norm(dim=(1, 2))
        vectors, values = light_correction(
            vectors, values, matrix, draw_columns(8, m, seed=seed, device=torch.device("cpu"))
        )
        after = (matrix - dense(vectors, values)).norm(dim=(1, 2))
        assert bool((after <= before * (1 + 1e-12)).all())
    assert float(orthogonality_error(vectors).max()) <= 1e-12
    assert bool((values.diff() <= 0).all())


def test_b4_a_correction_of_all_columns_is_rayleigh_ritz() -> None:
    matrix = with_spectrum((0.8 ** torch.arange(D)).expand(C, D), seed=8)
    vectors, values = some_state(8)
    found = light_correction(vectors, values, matrix, draw_columns(8, 8, seed=0, device=torch.device("cpu")))
    ritz, rotation = eigh_descending(vectors.mT @ matrix @ vectors)
    basis = vectors @ rotation
    assert relative_error(found[1], ritz) <= 1e-12
    assert relative_error(dense(*found), dense(basis, ritz)) <= 1e-12
    projector = vectors @ vectors.mT
    assert relative_error(found[0] @ found[0].mT, projector) <= 1e-12  # the span stays


def test_columns_are_drawn_uniformly_without_replacement() -> None:
    draws = [draw_columns(10, 4, seed=seed, device=torch.device("cpu")) for seed in range(2000)]
    assert all(len(set(draw.tolist())) == 4 for draw in draws)
    counts = torch.bincount(torch.cat(draws), minlength=10)
    # Each is in a draw with probability 0.4: 800 +- 22; five standard deviations.
    assert int((counts - 800).abs().max()) < 110
    assert torch.equal(draws[5], draw_columns(10, 4, seed=5, device=torch.device("cpu")))


def test_b5_solving_for_the_rows_equals_solving_for_their_gradient() -> None:
    n, p, q = 9, 17, D
    a, g = gaussian(C, n, q, seed=1), gaussian(C, n, p, seed=2)
    U_A, w_A = some_state(8)
    U_G = torch.linalg.qr(gaussian(C, p, 5, seed=4)).Q
    tail = torch.tensor([0.0, 0.02], dtype=torch.float64)
    A, G = Spectrum(U_A, w_A, tail), Spectrum(U_G, w_A[:, :5], tail)
    dampings = torch.tensor([0.1, 0.2], dtype=torch.float64), torch.tensor([0.3, 0.05], dtype=torch.float64)
    X, scale = FactoredInverse.of(A, G, *dampings).solve(g.mT @ a / n)
    expected = X if scale is None else X * scale[:, None, None]
    assert relative_error(solve_rows(A, G, dampings, (a, g), n), expected) <= 1e-12


def test_a_sketch_has_the_rows_second_moment_as_its_expectation() -> None:
    rows = gaussian(1, 30, 6, seed=0)
    size, draws = 20, 4000
    sketches = torch.stack([sketch_rows(rows, size, seed=seed) for seed in range(draws)])
    moments = sketches.mT @ sketches
    truth = rows.mT @ rows
    diagonal = truth.diagonal(dim1=-2, dim2=-1)
    # Var of an entry is (S_ii S_jj + S_ij^2)/size; the mean of all draws is within five standard deviations of it.
    deviation = ((diagonal.unsqueeze(-1) * diagonal.unsqueeze(-2) + truth**2) / size).sqrt()
    assert bool(((moments.mean(0) - truth).abs() <= 5 * deviation / draws**0.5).all())
    assert relative_error(moments.std(0), deviation) < 0.1


@pytest.mark.parametrize("numbers", [1, 1 << 22])
def test_a_sketch_is_linear_so_ranks_sums_sketch_the_union(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    monkeypatch.setattr(lowrank, "SKETCH_NUMBERS", numbers)
    first, second = gaussian(C, 7, D, seed=1), gaussian(C, 7, D, seed=2)
    together = sketch_rows(3.0 * first + second, 5, seed=4)
    apart = 3.0 * sketch_rows(first, 5, seed=4) + sketch_rows(second, 5, seed=4)
    assert relative_error(together, apart) <= 1e-14
    # Two ranks with seeds of their own: O = [O_1; O_2] on the union of their rows.
    identity = torch.eye(7, dtype=torch.float64).expand(C, 7, 7)
    combined = torch.cat([sketch_rows(identity, 5, seed=4), sketch_rows(identity, 5, seed=5)], -1)
    total = sketch_rows(first, 5, seed=4) + sketch_rows(second, 5, seed=5)
    assert relative_error(combined @ torch.cat([first, second], 1), total) <= 1e-14


def test_a_sketch_is_a_function_of_its_seed_in_every_precision() -> None:
    rows = gaussian(C, 7, D, seed=1)
    assert torch.equal(sketch_rows(rows, 5, seed=4), sketch_rows(rows, 5, seed=4))
    assert not torch.equal(sketch_rows(rows, 5, seed=4), sketch_rows(rows, 5, seed=5))
    assert relative_error(sketch_rows(rows.float(), 5, seed=4), sketch_rows(rows, 5, seed=4)) < 1e-6
    assert sketch_rows(rows[:, :0], 5, seed=4).abs().sum() == 0
