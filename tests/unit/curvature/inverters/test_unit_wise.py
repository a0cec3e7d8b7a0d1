"""The Fisher matrices of single units, inverted."""

import pytest
import torch

from kfdist.curvature.inverters import FIXED, PRECONDITIONERS
from kfdist.curvature.inverters.unit_wise import UnitWise, UnitWiseInverse
from kfdist.curvature.statistics import UnitFisher
from kfdist.wire.records import from_tree, to_tree

C, DAMPING = 5, 0.01


def inverse(F: torch.Tensor) -> UnitWiseInverse:
    made = UnitWise().invert(UnitFisher(F=F), damping=1.0, previous={}, seed=0).preconditioner
    assert isinstance(made, UnitWiseInverse)
    return made


def fisher(k: int, rows: int = 7) -> torch.Tensor:
    v = torch.randn(rows, C, k, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
    return torch.einsum("nci,ncj->cij", v, v) / rows


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("rows", [1, 7], ids=["singular", "regular"])
def test_solves_each_unit_exactly(k: int, rows: int):
    F = fisher(k, rows)
    V = torch.randn(C, 1, k, dtype=torch.float64)
    expected = torch.linalg.solve(F + DAMPING * torch.eye(k, dtype=F.dtype), V.mT).mT
    found = inverse(F)
    torch.testing.assert_close(found.apply(V, DAMPING), expected)
    assert found.shape == (C, 1, k)
    mean = F.diagonal(dim1=1, dim2=2).sum(-1) / k
    torch.testing.assert_close(found.fallback(V, DAMPING), V / (DAMPING + mean)[:, None, None])


def test_rounding_leaves_a_direction_no_longer_than_its_gradient_over_the_damping():
    """Two numbers of one unit that move together, in float32, where F + lambda I is singular."""
    F = torch.full((1, 2, 2), 1e6)
    direction = inverse(F).apply(torch.tensor([[[1.0, -1.0]]]), 1e-3)
    assert direction.abs().max() <= 1.0 / 1e-3


def test_travels_like_any_other():
    found = inverse(fisher(2))
    again = from_tree(to_tree(found, PRECONDITIONERS), PRECONDITIONERS)
    assert torch.equal(again.F, found.F)
    assert {"unit-wise": UnitWise} == {name: cls for name, cls in FIXED.items() if cls is UnitWise}
