"""Randomised decompositions of factors of which rows and columns are zero, or that have few dimensions."""

import pytest
import torch
from torch import Tensor

from kfdist.curvature import spectra
from kfdist.curvature.spectra import FactorSpectrum, randomized_spectrum
from kfdist.linalg import lowrank
from tests.support.matrices import with_spectrum

D, RANK = 60, 12


def partly_zero(used: int) -> Tensor:
    """Two factors whose first `used` rows of every other, and then of the others, aren't zero."""
    inner = with_spectrum((0.8 ** torch.arange(used, dtype=torch.float64)).expand(2, used), seed=used)
    places = torch.cat([torch.arange(0, D, 2), torch.arange(1, D, 2)])[:used].sort().values
    matrix = torch.zeros(2, D, D, dtype=torch.float64)
    matrix[:, places.unsqueeze(-1), places] = inner
    return matrix


def decomposed(matrix: Tensor, start: Tensor | None = None) -> FactorSpectrum:
    return randomized_spectrum(
        matrix, rank=RANK, oversampling=5, power_iterations=4, method="rsvd", seed=3, label="A", start=start
    )


@pytest.mark.parametrize("used", [1, 5, 12, 16, 40, 59])
@pytest.mark.parametrize("starts", [False, True])
def test_what_is_zero_is_left_out_and_the_result_is_that_of_the_whole(
    used: int, starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = partly_zero(used)
    start = torch.linalg.eigh(matrix).eigenvectors.flip(-1)[..., :RANK] if starts else None
    found = decomposed(matrix, start).spectrum
    exact = torch.linalg.eigvalsh(matrix).flip(-1)[..., :RANK]
    torch.testing.assert_close(found.values, exact, rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(found.vectors.mT @ found.vectors, torch.eye(RANK).double().expand(2, RANK, RANK))
    assert found.vectors.is_contiguous() and found.vectors.shape == (2, D, RANK) and not found.tail.any()
    product = found.vectors @ torch.diag_embed(found.values) @ found.vectors.mT
    error, rest = torch.linalg.matrix_norm(product - matrix, 2), torch.linalg.eigvalsh(matrix)[..., -RANK - 1]
    assert (error <= 1.05 * rest + 1e-12).all()
    monkeypatch.setattr(spectra, "MOSTLY", 0.0)
    torch.testing.assert_close(decomposed(matrix, start).spectrum.values, found.values, rtol=1e-3, atol=1e-12)


def test_the_decomposition_is_of_what_is_not_zero_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, basis = [], spectra.range_basis

    def noted(matrix: Tensor, sketch: Tensor, *, power_iterations: int) -> tuple[Tensor, Tensor]:
        sizes.append(matrix.shape[-1])
        return basis(matrix, sketch, power_iterations=power_iterations)

    monkeypatch.setattr(spectra, "range_basis", noted)
    monkeypatch.setattr(spectra, "FULL_BELOW", 1)
    decomposed(partly_zero(30))
    decomposed(partly_zero(31))
    assert sizes == [30, D], "a copy of more would cost as much memory as it saves time"
    assert not decomposed(torch.zeros(2, D, D).double()).spectrum.values.any()


WIDE = 400


def of_rows(rows: int, seed: int = 0, groups: int = 1) -> Tensor:
    """Factors in float32 that are sums over so few rows, of which the last are small."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(0, -2, rows).unsqueeze(-1)
    found = torch.randn(groups, rows, WIDE, generator=generator) * sizes
    return found.mT @ found


@pytest.mark.parametrize("rows", [1, 8, 40, 90])
def test_a_factor_of_few_rows_is_decomposed_whole_by_two_products(rows: int, monkeypatch: pytest.MonkeyPatch):
    """Also where it has more dimensions than pairs are kept of."""
    products, multiply = [], lowrank._product

    def noted(matrix: Tensor, columns: Tensor) -> Tensor:
        products.append(columns.shape[-1])
        return multiply(matrix, columns)

    monkeypatch.setattr(lowrank, "_product", noted)
    matrix = of_rows(rows, groups=2)
    found = randomized_spectrum(matrix, rank=50, oversampling=5, power_iterations=4, method="rsvd", seed=1, label="A")
    assert products == [rows + 5] * 2, "its rank is found"
    w, U = found.spectrum.values.double(), found.spectrum.vectors.double()
    exact = torch.linalg.eigvalsh(matrix.double()).flip(-1)
    kept = w.shape[-1]
    assert kept == min(50, rows + 5)
    torch.testing.assert_close(w, exact[..., :kept], rtol=1e-4, atol=1e-5 * float(exact.max()))
    error = torch.linalg.matrix_norm(matrix - U @ torch.diag_embed(w) @ U.mT)
    beyond = torch.linalg.vector_norm(exact[..., kept:], dim=-1)
    assert (error <= 1.0001 * beyond + 1e-5 * exact[..., 0]).all()
    torch.testing.assert_close(U.mT @ U, torch.eye(kept).double().expand(2, -1, -1), rtol=0, atol=1e-4)


def test_dimensions_that_the_submatrix_does_not_show_are_found_all_the_same():
    """One row that is zero wherever the rank is looked for: the result is checked, and not taken."""
    matrix = of_rows(8)
    places = torch.arange(116) * WIDE // 116
    hidden = torch.randn(1, WIDE, generator=torch.Generator().manual_seed(5))
    hidden[:, places] = 0.0
    matrix = matrix + 3 * hidden.mT @ hidden
    assert lowrank.numerical_rank(matrix, torch.arange(WIDE), most=100) == 8
    found = randomized_spectrum(matrix, rank=50, oversampling=0, power_iterations=4, method="rsvd", seed=1, label="A")
    w, U = found.spectrum.values, found.spectrum.vectors
    error = torch.linalg.matrix_norm(matrix - U @ torch.diag_embed(w) @ U.mT)
    assert float(error / torch.linalg.matrix_norm(matrix)) < 1e-5
    assert w.shape[-1] == 50


@pytest.mark.parametrize("rows", [101, 200, 2000])
def test_more_dimensions_than_are_few_are_told_from_a_submatrix(rows: int):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(1, rows, WIDE, generator=generator)
    assert lowrank.numerical_rank(matrix.mT @ matrix, torch.arange(WIDE), most=100) is None


@pytest.mark.parametrize("d", [50, 51, 52])
def test_a_factor_hardly_wider_than_the_sketch_is_decomposed_in_full(d: int):
    matrix = with_spectrum((0.9 ** torch.arange(d, dtype=torch.float64)).expand(1, d), seed=3)
    found = decomposed(matrix)
    exact = torch.linalg.eigvalsh(matrix).flip(-1)
    error = float(torch.linalg.vector_norm(exact[..., RANK:]) / torch.linalg.vector_norm(exact))
    if spectra.is_narrow(d, RANK + 5):
        torch.testing.assert_close(found.spectrum.values, exact[..., :RANK])
        assert found.diagnostics["approximation_error_A"] == pytest.approx(error)
    assert found.spectrum.vectors.shape == (1, d, RANK)


def test_an_accelerator_decomposes_in_full_what_is_no_wider_than_the_sketch():
    assert [spectra.is_narrow(d, 230, "cpu") for d in (230, 231, 690, 691)] == [True, True, True, False]
    assert [spectra.is_narrow(d, 230, "cuda") for d in (230, 231, 690, 691)] == [True, False, False, False]
