"""Packing, factorising and checking of symmetric matrices, against plain dense formulas in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfdist.linalg import psd
from tests.support.matrices import gaussian, with_spectrum

TOLERANCE = 1e-12
"""Rounding of a few float64 operations on matrices of size 12 and condition at most 1e3."""


def symmetric(*shape: int, seed: int) -> torch.Tensor:
    matrix = gaussian(*shape, seed=seed)
    return matrix + matrix.mT


@given(d=st.integers(1, 40), c=st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_packed_triangles_come_back_exactly(d: int, c: int) -> None:
    matrix = symmetric(c, d, d, seed=d)
    packed = psd.pack_triangle(matrix)
    assert packed.shape == (c, psd.triangle_size(d))
    assert torch.equal(psd.unpack_triangle(packed), matrix)


def test_packing_keeps_dtype_and_any_leading_dimensions() -> None:
    matrix = symmetric(2, 3, 5, 5, seed=1).float()
    assert psd.pack_triangle(matrix).dtype == torch.float32
    assert torch.equal(psd.unpack_triangle(psd.pack_triangle(matrix)), matrix)
    assert torch.equal(psd.unpack_triangle(psd.pack_triangle(matrix[0, 0])), matrix[0, 0])


def test_packing_reads_the_lower_triangle_alone() -> None:
    matrix = gaussian(6, 6, seed=2)
    expected = matrix.tril() + matrix.tril(-1).mT
    assert torch.equal(psd.unpack_triangle(psd.pack_triangle(matrix)), expected)


def test_sums_of_packed_triangles_are_packed_sums() -> None:
    """What the ranks rely on when they add triangles up."""
    first, second = symmetric(7, 7, seed=3), symmetric(7, 7, seed=4)
    together = psd.unpack_triangle(psd.pack_triangle(first) + psd.pack_triangle(second))
    assert torch.equal(together, first + second)


def test_packing_neither_loses_nor_spreads_nan() -> None:
    matrix = torch.ones(6, 6)
    matrix[4, 1] = matrix[1, 4] = float("nan")
    assert torch.equal(psd.unpack_triangle(psd.pack_triangle(matrix)).isnan(), matrix.isnan())


@pytest.mark.parametrize("size", [2, 4, 5, 7, 11])
def test_other_sizes_are_no_triangle(size: int) -> None:
    with pytest.raises(ValueError, match=f"{size} numbers are no triangle"):
        psd.unpack_triangle(torch.zeros(size))


def test_cholesky_inverse_equals_the_dense_inverse() -> None:
    matrix = with_spectrum(torch.logspace(0, -6, 12).expand(2, 12), seed=1)
    damping = torch.tensor([1e-3, 1e-2], dtype=torch.float64)
    inverse, definite = psd.damped_cholesky_inverse(matrix, damping)
    expected = torch.linalg.inv(matrix + damping[:, None, None] * torch.eye(12))
    assert bool(definite.all())
    assert torch.equal(inverse, inverse.mT)
    torch.testing.assert_close(inverse, expected, rtol=TOLERANCE, atol=1e3 * TOLERANCE)


def test_cholesky_says_which_matrix_is_indefinite() -> None:
    matrix = torch.stack([torch.eye(3), torch.diag(torch.tensor([1.0, -1.0, 1.0]))])
    _, definite = psd.damped_cholesky_inverse(matrix, torch.tensor([0.1, 0.1]))
    assert definite.tolist() == [True, False]


def test_eigenvalues_descend_and_rebuild_the_matrix() -> None:
    matrix = symmetric(2, 12, 12, seed=5)
    values, vectors = psd.eigh_descending(matrix)
    assert bool((values.diff() <= 0).all())
    torch.testing.assert_close(vectors @ torch.diag_embed(values) @ vectors.mT, matrix, rtol=0, atol=TOLERANCE * 100)


def test_residuals_are_zero_for_the_truth_and_see_an_error() -> None:
    matrix = with_spectrum(torch.linspace(2, 0.5, 12), seed=6)
    probes, damping = gaussian(12, 4, seed=7), torch.tensor(0.1, dtype=torch.float64)
    inverse, _ = psd.damped_cholesky_inverse(matrix, damping)
    values, vectors = psd.eigh_descending(matrix)
    wrong = gaussian(12, 12, seed=8)
    off_by_a_percent = {
        "inverse": psd.inverse_residual(matrix, damping, inverse * 1.01, probes),
        "eigen": psd.eigen_residual(matrix, values * 1.01, vectors, probes),
        "orthogonality": psd.orthogonality_residual(vectors * 1.005, probes),
    }
    assert all(float(value) == pytest.approx(0.01, rel=0.05) for value in off_by_a_percent.values())
    assert psd.inverse_residual(matrix, damping, inverse, probes) < TOLERANCE
    assert psd.eigen_residual(matrix, values, vectors, probes) < TOLERANCE
    assert psd.orthogonality_residual(vectors, probes) < TOLERANCE
    assert psd.inverse_residual(matrix, damping, inverse + wrong, probes) > 1
    assert psd.eigen_residual(torch.zeros(12, 12).double(), values * 0, vectors, probes) == 0


def test_power_iteration_bounds_the_largest_eigenvalue_from_below() -> None:
    values = torch.tensor([3.0, 1.0, 0.5, 0.1])
    found = psd.largest_eigenvalue(with_spectrum(values, seed=9), gaussian(4, 1, seed=1))
    assert 2.99 < float(found) <= 3.0 + TOLERANCE
    assert psd.largest_eigenvalue(torch.zeros(4, 4), torch.ones(4, 1)) == 0


def test_asymmetry_is_relative() -> None:
    matrix = symmetric(5, 5, seed=1)
    matrix[0, 1] += 0.1 * matrix.abs().max()
    assert float(psd.asymmetry(1e-20 * matrix)) == pytest.approx(float(psd.asymmetry(matrix)))
    assert float(psd.asymmetry(torch.zeros(3, 3))) == 0


@pytest.mark.parametrize("d", [1, 2, 5, 6, 7, 8, 12, 13])
def test_what_is_done_block_by_block_is_what_would_be_done_at_once(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psd, "_BLOCK", 3)
    matrix = gaussian(2, d, d, seed=d)
    lower = matrix.tril()
    mirrored = lower + lower.tril(-1).mT
    only_lower = torch.where(torch.ones(d, d).tril().bool(), matrix, torch.nan)
    packed = psd.pack_triangle(only_lower)
    assert packed.isfinite().all() and torch.equal(psd.unpack_triangle(packed), mirrored)
    place = torch.empty_like(packed)
    assert psd.pack_triangle(only_lower, out=place) is place and torch.equal(place, packed)
    assert torch.equal(psd.mirror_lower_(only_lower), mirrored)
    wanted = (matrix - matrix.mT).abs().amax((-2, -1)) / matrix.abs().amax((-2, -1))
    assert torch.equal(psd.asymmetry(matrix), wanted)
    assert not psd.asymmetry(torch.zeros(2, d, d)).any()
