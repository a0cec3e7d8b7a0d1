"""Randomised decompositions: R2, R5 and R6 of algorithms.md on the functions themselves; sums with fewer columns."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kfdist.linalg import lowrank
from kfdist.linalg.lowrank import (
    PAIRED,
    compress_columns,
    gaussian_sketch,
    randomized_eigh,
    randomized_svd,
    range_basis,
)
from tests.support.matrices import gaussian, relative_error, with_spectrum

TOLERANCE = 1e-10
"""Error of an exact recovery in float64."""

D, RANK = 60, 10

both_methods = pytest.mark.parametrize("decompose", [randomized_svd, randomized_eigh])
Decompose = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def leading(matrix: Tensor, decompose: Decompose, *, oversampling: int, power_iterations: int = 4, seed: int = 0):
    sketch = gaussian_sketch(matrix, RANK + oversampling, seed=seed)
    values, vectors = decompose(*range_basis(matrix, sketch, power_iterations=power_iterations))
    return values[..., :RANK], vectors[..., :RANK]


def rebuilt(values: Tensor, vectors: Tensor) -> Tensor:
    return vectors @ torch.diag_embed(values) @ vectors.mT


@both_methods
def test_r2_a_matrix_of_the_rank_is_recovered_exactly(decompose: Decompose) -> None:
    spectrum = torch.where(torch.arange(D) < RANK, 1.0 / (1 + torch.arange(D)), 0.0)
    matrix = with_spectrum(spectrum.expand(2, D), seed=1)
    error = rebuilt(*leading(matrix, decompose, oversampling=5)) - matrix
    assert error.abs().max() < TOLERANCE


@both_methods
def test_r5_the_error_is_about_the_first_neglected_eigenvalue(decompose: Decompose) -> None:
    """||M - U w U^T||_2 <= (1 + small) w_{r+1} for q = 4 on w_i = 0.9^i; no approximation of rank r does better."""
    matrix = with_spectrum(0.9 ** torch.arange(D, dtype=torch.float64), seed=2)
    for seed in range(5):
        error = rebuilt(*leading(matrix, decompose, oversampling=10, seed=seed)) - matrix
        assert 0.9**RANK * (1 - 1e-6) <= float(torch.linalg.matrix_norm(error, 2)) <= 1.02 * 0.9**RANK


def test_more_power_iterations_are_more_accurate() -> None:
    matrix = with_spectrum(0.97 ** torch.arange(D, dtype=torch.float64), seed=3)
    errors = [
        float((rebuilt(*leading(matrix, randomized_svd, oversampling=2, power_iterations=q)) - matrix).norm())
        for q in (0, 1, 4)
    ]
    assert errors[0] > errors[1] > errors[2]


SPECTRA = {
    "power": (1 + torch.arange(2 * D, dtype=torch.float64)) ** -1.0,
    "slow power": (1 + torch.arange(2 * D, dtype=torch.float64)) ** -0.5,
    "decaying": 0.9 ** torch.arange(2 * D, dtype=torch.float64),
    "slowly decaying": 0.98 ** torch.arange(2 * D, dtype=torch.float64),
    "gap": torch.where(torch.arange(2 * D) < RANK, 1.0, 0.1).double(),
}


@both_methods
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_two_multiplications_fewer_are_as_good(
    decompose: Decompose, spectrum: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of six at the default four power iterations; means over sketches, relative to the least error of the rank."""
    matrix, errors, counts = with_spectrum(SPECTRA[spectrum], seed=2).float(), [], []
    product = lowrank._product
    monkeypatch.setattr(lowrank, "_product", lambda *operands: counts.append(1) or product(*operands))
    for fewest in (PAIRED, 99):
        monkeypatch.setattr(lowrank, "PAIRED", fewest)
        found = [rebuilt(*leading(matrix, decompose, oversampling=4, seed=seed)) for seed in range(8)]
        errors.append(sum(float((each - matrix).norm()) for each in found) / 8)
        counts.append(0)
    end = counts.index(0)
    assert (end, len(counts) - end - 2) == (8 * 4, 8 * 6)
    assert errors[0] <= 1.01 * errors[1]


def test_where_two_bases_do_not_fit_one_is_used() -> None:
    matrix = with_spectrum(0.9 ** torch.arange(D, dtype=torch.float64), seed=2)
    basis, image = range_basis(matrix, gaussian_sketch(matrix, D // 2 + 1, seed=0), power_iterations=PAIRED)
    assert basis.shape == image.shape == (D, D // 2 + 1)
    assert (matrix @ basis - image).abs().max() < TOLERANCE


@both_methods
@pytest.mark.parametrize("spectrum", ["decaying", "rank-one", "zero"])
def test_r6_vectors_are_orthonormal_in_float32(decompose: Decompose, spectrum: str) -> None:
    """R6, also where there is nothing to find; 1e-5 is the bound of algorithms.md."""
    values = {
        "decaying": 0.5 ** torch.arange(D),
        "rank-one": torch.eye(D)[0],
        "zero": torch.zeros(D),
    }[spectrum]
    _, vectors = leading(with_spectrum(values, seed=4).float(), decompose, oversampling=10)
    assert (vectors.mT @ vectors - torch.eye(RANK)).abs().max() < 1e-5


@both_methods
def test_where_products_may_be_rounded_to_fewer_bits_bases_are_made_by_reflections(
    decompose: Decompose, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shortened(matrix: Tensor, columns: Tensor) -> Tensor:  # as a processor with such products would
        return (columns.mT.bfloat16() @ matrix.bfloat16()).mT.float()

    monkeypatch.setattr(lowrank, "_product", shortened)
    monkeypatch.setattr(lowrank, "_solved", lambda columns, inverse: pytest.fail("made by products"))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        matrix = with_spectrum(1 / torch.arange(1, 101).double(), seed=0).float()
        values, _ = leading(matrix[None], decompose, oversampling=5)
    finally:
        torch.set_float32_matmul_precision(before)
    assert values[0, :2].tolist() == pytest.approx([1.0, 0.5], rel=0.02)


@both_methods
def test_a_large_negative_eigenvalue_keeps_its_sign(decompose: Decompose) -> None:
    spectrum = torch.zeros(D)
    spectrum[:3] = torch.tensor([1.0, -2.0, 0.5])
    matrix = with_spectrum(spectrum, seed=5)
    sketch = gaussian_sketch(matrix, RANK, seed=0)
    values, vectors = decompose(*range_basis(matrix, sketch, power_iterations=4))
    assert float(values.min()) == pytest.approx(-2.0)
    assert (rebuilt(values, vectors) - matrix).abs().max() < TOLERANCE


def test_the_sketch_is_a_function_of_its_seed() -> None:
    matrix = torch.zeros(2, 5, 5)
    torch.manual_seed(1)
    first = gaussian_sketch(matrix, 3, seed=7)
    torch.manual_seed(2)
    assert torch.equal(gaussian_sketch(matrix, 3, seed=7), first)
    assert torch.equal(gaussian_sketch(matrix.double(), 3, seed=7).float(), first)
    assert not torch.equal(gaussian_sketch(matrix, 3, seed=8), first)


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
