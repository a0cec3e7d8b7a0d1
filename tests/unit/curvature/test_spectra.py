"""Randomised decompositions of factors of which rows and columns are zero."""

import pytest
import torch
from torch import Tensor

from kfdist.curvature import spectra
from kfdist.curvature.spectra import FactorSpectrum, randomized_spectrum
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

    def noted(matrix: Tensor, sketch: Tensor, *, power_iterations: int) -> Tensor:
        sizes.append(matrix.shape[-1])
        return basis(matrix, sketch, power_iterations=power_iterations)

    monkeypatch.setattr(spectra, "range_basis", noted)
    decomposed(partly_zero(30))
    decomposed(partly_zero(31))
    assert sizes == [30, D], "a copy of more would cost as much memory as it saves time"
    assert not decomposed(torch.zeros(2, D, D).double()).spectrum.values.any()
