"""Eva against the dense rank-one block (algorithms.md 7.7 and 10.8)."""

import pytest
import torch

from kfdist.curvature.inverter import Placement
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.inverters.eva import EvaPreconditioner
from kfdist.curvature.references import dense_kronecker, solve_dense
from kfdist.curvature.statistics import KroneckerFactors, MeanVectors
from kfdist.types import BlockShape
from tests.support.inversions import invert_with_ladder
from tests.support.matrices import gaussian, relative_error

C, P, Q = 2, 4, 6
DAMPING = 3e-2
V = gaussian(C, P, Q, seed=3)
A, G = gaussian(C, Q, seed=1), gaussian(C, P, seed=2)


def make(a: torch.Tensor = A, g: torch.Tensor = G) -> EvaPreconditioner:
    made = make_inverter("eva").invert(MeanVectors(a=a, g=g), damping=DAMPING, previous={}, seed=0).preconditioner
    assert isinstance(made, EvaPreconditioner)
    return made


def rank_one_factors() -> KroneckerFactors:
    return KroneckerFactors(A=A.unsqueeze(-1) * A.unsqueeze(-2), G=G.unsqueeze(-1) * G.unsqueeze(-2))


@pytest.mark.parametrize("damping", [1e-4, DAMPING, 1.0, 1e6])
def test_equals_the_dense_solution(damping: float) -> None:
    factors = rank_one_factors()
    expected = solve_dense(dense_kronecker(factors.A, factors.G), damping, V)
    assert relative_error(make().apply(V, damping), expected) < 1e-10


def test_equivalence_8_with_joint_damping_of_rank_one_factors() -> None:
    eigen = invert_with_ladder(
        make_inverter("kfac-eigen"), rank_one_factors(), damping=DAMPING, previous={}, seed=0
    ).preconditioner
    assert eigen is not None
    assert relative_error(make().apply(V, DAMPING), eigen.apply(V, DAMPING)) < 1e-10
    assert relative_error(make().fallback(V, DAMPING), eigen.fallback(V, DAMPING)) < 1e-12


def test_along_the_vectors_it_damps_and_across_them_it_divides() -> None:
    along = G.unsqueeze(-1) * A.unsqueeze(-2)
    length = (A.square().sum(-1) * G.square().sum(-1))[:, None, None]
    assert relative_error(make().apply(along, DAMPING), along / (DAMPING + length)) < 1e-10
    across = V - (V * along).sum((1, 2), keepdim=True) / length * along
    assert relative_error(make().apply(across, DAMPING), across / DAMPING) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_vectors_leave_the_damping(dtype: torch.dtype) -> None:
    made = make(torch.zeros_like(A, dtype=dtype), G.to(dtype))
    torch.testing.assert_close(made.apply(V.to(dtype), DAMPING), V.to(dtype) / DAMPING)


def test_what_it_asks_of_the_runtime() -> None:
    inverter = make_inverter("eva")
    assert inverter.needs(BlockShape(d_out=P, d_in=Q)).sums == {"a", "g"}
    assert inverter.placement is Placement.WORKER
    assert make().shape == (C, P, Q)
