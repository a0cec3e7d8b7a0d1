"""The exact inverse of a block whose large factor is of few rows."""

import pytest
import torch

from kfdist.bench import factor_problem
from kfdist.bench.factor_problem import DAMPING, Problem, exact_spectrum


@pytest.mark.parametrize("d", [30, 100])
def test_the_truth_is_that_of_the_dense_factors(d: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(factor_problem, "EXAMPLES", 20)
    problem = Problem(d)
    A, G, V = problem.factors().A[0].double(), problem.G[0].double(), problem.gradient[0].double()
    kronecker = torch.kron(G, A) + DAMPING * torch.eye(16 * d).double()
    expected = torch.linalg.solve(kronecker, V.flatten()).view(1, 16, d)
    torch.testing.assert_close(problem.truth("common"), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("rows", [5, 12])
def test_eigenpairs_of_few_and_of_many_rows(rows: int):
    given = torch.randn(rows, 8, generator=torch.Generator().manual_seed(0)).double()
    found = exact_spectrum(given)
    rebuilt = found.vectors[0] * found.values[0] @ found.vectors[0].mT
    torch.testing.assert_close(rebuilt, given.mT @ given)
    assert found.vectors.shape[-1] == min(rows, 8) and bool((found.values[0].diff() <= 0).all())
