"""Damped Kronecker inverses against dense solves of the whole product; flattening is row-major throughout."""

import pytest
import torch

from kfdist.curvature.references import dense_kronecker, solve_dense, solve_factored_dense
from kfdist.linalg.kronecker import (
    RELATIVE_FLOOR,
    FactoredInverse,
    JointInverse,
    Spectrum,
    split_by_largest,
    split_by_trace,
)
from tests.support.matrices import gaussian, relative_error, with_spectrum

TOLERANCE = 1e-12
"""Rounding of float64 solves whose condition number is at most 1e3."""

C, P, Q = 2, 5, 8
DAMPING = 0.05
V = gaussian(C, P, Q, seed=1)


def spectrum(d: int, rank: int, tail: float, seed: int) -> Spectrum:
    vectors = torch.linalg.qr(gaussian(C, d, d, seed=seed)).Q[..., :rank]
    values = torch.linspace(3, 1, rank, dtype=torch.float64).expand(C, rank)
    return Spectrum(vectors, values, torch.full((C,), tail, dtype=torch.float64))


def dense(part: Spectrum) -> torch.Tensor:
    """U diag(w) U^T + tail (I - U U^T), written out."""
    projector = part.vectors @ part.vectors.mT
    outside = part.tail[:, None, None] * (torch.eye(projector.shape[-1]) - projector)
    return part.vectors @ torch.diag_embed(part.values) @ part.vectors.mT + outside


def solved(inverse: JointInverse | FactoredInverse) -> torch.Tensor:
    given = V.clone()
    X, scale = inverse.solve(given)
    assert torch.equal(given, V), "gradients stay"
    return X if scale is None else X * scale[:, None, None]


def solved_apart(inverse: FactoredInverse) -> torch.Tensor:
    given = V[..., :-1].clone(), V[..., -1:].clone()
    most, last, scale = inverse.solve_apart(*given)
    assert torch.equal(torch.cat(given, -1), V), "gradients stay"
    X = torch.cat([most, last], -1)
    return X if scale is None else X * scale[:, None, None]


@pytest.mark.parametrize("tail", [0.0, 0.3])
@pytest.mark.parametrize("rank_A", [3, Q])
@pytest.mark.parametrize("rank_G", [2, P])
def test_solves_equal_dense_solves_of_the_completed_matrices(rank_A: int, rank_G: int, tail: float) -> None:
    """R3 for one factor and for both, whichever bases are complete."""
    A, G = spectrum(Q, rank_A, tail, seed=2), spectrum(P, rank_G, tail, seed=3)
    assert (A.complete, G.complete) == (rank_A == Q, rank_G == P)
    expected = solve_dense(dense_kronecker(dense(A), dense(G)), DAMPING, V)
    assert relative_error(solved(JointInverse.of(A, G, DAMPING)), expected) < TOLERANCE
    shares = torch.tensor([0.2, 0.3]).double(), torch.tensor([0.4, 0.1]).double()
    expected = solve_factored_dense(dense(A), dense(G), shares, V)
    for steady in (True, False):
        inverse = FactoredInverse.of(A, G, *shares, steady=steady)
        assert relative_error(solved(inverse), expected) < TOLERANCE
        assert relative_error(solved_apart(inverse), expected) < TOLERANCE


def test_the_dense_product_is_row_major() -> None:
    A, G = with_spectrum(torch.ones(C, Q), seed=4) + 1, gaussian(C, P, P, seed=5)
    flat = (dense_kronecker(A, G) @ V.flatten(1).unsqueeze(-1)).reshape(V.shape)
    assert relative_error(flat, G @ V @ A.mT) < TOLERANCE


def test_shares_multiply_to_the_damping() -> None:
    shares = split_by_trace(torch.tensor([3.0, 1e-20]), torch.tensor([5.0, 1e20]), d_in=4, d_out=7, damping=DAMPING)
    torch.testing.assert_close(shares[0] * shares[1], torch.full((2,), DAMPING))


def test_k3_pi_is_invariant_to_moving_scale_between_the_factors() -> None:
    """K3: A -> c A, G -> G/c scales lambda_A by c and lambda_G by 1/c, so the damped product stays."""
    trace_A, trace_G = torch.tensor([2.0]).double(), torch.tensor([7.0]).double()
    before = split_by_trace(trace_A, trace_G, d_in=4, d_out=3, damping=DAMPING)
    for scale in (1e-6, 3.0, 1e6):
        after = split_by_trace(trace_A * scale, trace_G / scale, d_in=4, d_out=3, damping=DAMPING)
        torch.testing.assert_close(after[0], before[0] * scale, rtol=TOLERANCE, atol=0)
        torch.testing.assert_close(after[1], before[1] / scale, rtol=TOLERANCE, atol=0)


def test_pi_is_one_where_a_factor_is_zero() -> None:
    traces = torch.tensor([0.0, 2.0, 0.0]), torch.tensor([3.0, 0.0, 0.0])
    share_A, share_G = split_by_trace(*traces, d_in=4, d_out=3, damping=DAMPING)
    assert torch.equal(share_A, share_G)
    assert share_A.tolist() == pytest.approx([DAMPING**0.5] * 3)


def test_extreme_traces_stay_finite_in_float32() -> None:
    traces = torch.tensor([1e30, 1e-30, 1e30]), torch.tensor([1e30, 1e-30, 1e-30])
    for share in split_by_trace(*traces, d_in=4, d_out=3, damping=DAMPING):
        assert bool(share.isfinite().all()) and bool((share > 0).all())


def test_relative_damping_has_a_floor() -> None:
    largest_A, largest_G = torch.tensor([2.0, 0.0, RELATIVE_FLOOR / 2]), torch.tensor([5.0, 4.0, 0.0])
    share_A, share_G = split_by_largest(largest_A, largest_G, damping=0.1)
    assert share_A.tolist() == pytest.approx([0.2, 0.1, 0.1])
    assert share_G.tolist() == pytest.approx([0.5, 0.4, 0.1])
