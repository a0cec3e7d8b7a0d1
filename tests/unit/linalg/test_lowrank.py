"""Randomised decompositions: R2, R5 and R6 of algorithms.md on the functions themselves."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kfdist.linalg.lowrank import gaussian_sketch, randomized_eigh, randomized_svd, range_basis
from tests.support.matrices import with_spectrum

TOLERANCE = 1e-10
"""Error of an exact recovery in float64."""

D, RANK = 60, 10

both_methods = pytest.mark.parametrize("decompose", [randomized_svd, randomized_eigh])
Decompose = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def leading(matrix: Tensor, decompose: Decompose, *, oversampling: int, power_iterations: int = 4, seed: int = 0):
    sketch = gaussian_sketch(matrix, RANK + oversampling, seed=seed)
    values, vectors = decompose(matrix, range_basis(matrix, sketch, power_iterations=power_iterations))
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
def test_a_large_negative_eigenvalue_keeps_its_sign(decompose: Decompose) -> None:
    spectrum = torch.zeros(D)
    spectrum[:3] = torch.tensor([1.0, -2.0, 0.5])
    matrix = with_spectrum(spectrum, seed=5)
    sketch = gaussian_sketch(matrix, RANK, seed=0)
    values, vectors = decompose(matrix, range_basis(matrix, sketch, power_iterations=4))
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
