"""Conjugate gradients against dense solves; that systems stop for themselves, and what breaks down stays good."""

import pytest
import torch
from torch import Tensor

from kfdist.linalg import cg
from kfdist.linalg.cg import CgSolution, Operator, conjugate_gradient
from tests.support.matrices import gaussian, relative_error, with_spectrum

P, Q = 5, 6


def dense(spectra: list[list[float]], *, seed: int = 1) -> Tensor:
    """One matrix per system on row-major vectors, `[c, p q, p q]`."""
    return with_spectrum(torch.tensor(spectra, dtype=torch.float64), seed=seed)


def product_with(matrix: Tensor) -> Operator:
    return lambda V: (matrix.to(V.dtype) @ V.flatten(1).unsqueeze(-1)).view_as(V)


def solved(matrix: Tensor, V: Tensor) -> Tensor:
    return torch.linalg.solve(matrix, V.double().flatten(1).unsqueeze(-1)).view_as(V)


def solve(matrix: Tensor, V: Tensor, **settings: object) -> CgSolution:
    return conjugate_gradient(product_with(matrix), V, **{"tolerance": 1e-13, "max_iterations": 100, **settings})  # type: ignore[arg-type]


def spread(low: float, high: float) -> list[float]:
    return torch.logspace(torch.tensor(low).log10(), torch.tensor(high).log10(), P * Q).tolist()


MATRIX = dense([spread(0.1, 10.0), spread(0.01, 1.0)])
V = gaussian(2, P, Q, seed=2)


def test_converges_to_the_dense_solution() -> None:
    found = solve(MATRIX, V)
    assert relative_error(found.solution, solved(MATRIX, V)) < 1e-11
    assert not bool(found.broken.any())
    assert bool((found.residual <= 1e-13).all())


def test_as_many_steps_as_distinct_eigenvalues() -> None:
    matrix = dense([[1.0] * 20 + [3.0] * 9 + [7.0], [2.0] * 30])
    found = solve(matrix, V, tolerance=1e-10)
    assert found.iterations.tolist() == [3, 1]
    assert relative_error(found.solution, solved(matrix, V)) < 1e-10


def test_energy_error_falls_at_every_step() -> None:
    """CG4; the residual may rise, so it is no reason to reject an iterate."""
    exact = solved(MATRIX, V)
    errors = []
    for steps in range(12):
        error = solve(MATRIX, V, max_iterations=steps).solution - exact
        errors.append((error * product_with(MATRIX)(error)).sum((1, 2)))
    assert bool((torch.stack(errors).diff(dim=0) < 0).all())


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 1e-3])
def test_stops_at_the_first_iterate_within_the_tolerance(tolerance: float) -> None:
    found = solve(MATRIX, V, tolerance=tolerance)
    true = (V - product_with(MATRIX)(found.solution)).flatten(1).norm(dim=1) / V.flatten(1).norm(dim=1)
    torch.testing.assert_close(found.residual, true, rtol=1e-8, atol=0)
    assert bool((found.residual <= tolerance).all())
    for group, steps in enumerate(found.iterations.tolist()):
        earlier = solve(MATRIX, V, tolerance=1e-13, max_iterations=steps - 1)
        assert earlier.residual[group] > tolerance


def test_systems_stop_for_themselves() -> None:
    """Each ends with the bits that it has beside one that is done at once, however long the others go on."""
    together = solve(MATRIX, V, tolerance=1e-6)
    assert together.iterations[0] != together.iterations[1]
    for group in range(2):
        lonely = V.clone()
        lonely[1 - group] = 0
        alone = solve(MATRIX, lonely, tolerance=1e-6)
        assert torch.equal(alone.solution[group], together.solution[group])
        assert alone.iterations[group] == together.iterations[group]


@pytest.mark.parametrize("jacobi", [False, True])
def test_the_loop_without_a_look_at_values_has_the_same_bits(jacobi: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inverse_diagonal = (1 / MATRIX.diagonal(dim1=1, dim2=2)).view_as(V) if jacobi else None
    early = solve(MATRIX, V, tolerance=1e-2, inverse_diagonal=inverse_diagonal)
    monkeypatch.setattr(cg, "_all_stopped", lambda active: False)
    full = solve(MATRIX, V, tolerance=1e-2, inverse_diagonal=inverse_diagonal)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(early, full, strict=True))


def test_reads_nothing_back_on_an_accelerator() -> None:
    """Tensors on the meta device have no values: reading one raises."""
    matrix, gradient = MATRIX.to("meta"), V.to("meta")
    found = solve(matrix, gradient, start=gradient, inverse_diagonal=gradient, max_iterations=3)
    assert found.solution.shape == V.shape


def test_jacobi_solves_a_diagonal_at_once_and_helps_where_scales_differ() -> None:
    scales = torch.logspace(0, 6, P * Q, dtype=torch.float64).expand(2, -1)
    diagonal = torch.diag_embed(scales)
    found = solve(diagonal, V, inverse_diagonal=(1 / scales).view_as(V))
    assert found.iterations.tolist() == [1, 1]
    matrix = diagonal + 0.1 * scales.sqrt().unsqueeze(-1) * MATRIX * scales.sqrt().unsqueeze(-2)
    plain = solve(matrix, V, tolerance=1e-8, max_iterations=2000)
    helped = solve(matrix, V, tolerance=1e-8, inverse_diagonal=(1 / matrix.diagonal(dim1=1, dim2=2)).view_as(V))
    assert bool((helped.iterations < plain.iterations / 3).all())
    assert relative_error(helped.solution, solved(matrix, V)) < 1e-6


@pytest.mark.parametrize("factor", [1e-30, -3.0, 1.0, 1e30])
def test_a_guess_of_any_length_is_scaled(factor: float) -> None:
    """The exact direction needs no step, however long it is."""
    found = solve(MATRIX, V, start=factor * solved(MATRIX, V), tolerance=1e-10)
    assert found.iterations.tolist() == [0, 0]
    assert relative_error(found.solution, solved(MATRIX, V)) < 1e-10


def test_a_guess_is_never_worse_than_none() -> None:
    exact = solved(MATRIX, V)

    def energy(x: Tensor) -> Tensor:
        return ((x - exact) * product_with(MATRIX)(x - exact)).sum((1, 2))

    for seed in range(20):
        start = solve(MATRIX, V, start=gaussian(2, P, Q, seed=seed), max_iterations=0).solution
        assert bool((energy(start) <= energy(torch.zeros_like(V)) * (1 + 1e-12)).all())


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_useless_guess_is_left_out(value: float) -> None:
    found = solve(MATRIX, V, start=torch.full_like(V, value))
    assert torch.equal(found.solution, solve(MATRIX, V).solution)


def test_the_tolerance_is_against_the_gradient_also_with_a_guess() -> None:
    near = solved(MATRIX, V) + 1e-3 * gaussian(2, P, Q, seed=9)
    found = solve(MATRIX, V, start=near, tolerance=0.1)
    assert found.iterations.tolist() == [0, 0]
    assert bool((found.residual < 0.1).all())


def test_a_zero_gradient_has_a_zero_solution() -> None:
    gradient = torch.stack([torch.zeros(P, Q, dtype=torch.float64), V[1]])
    found = solve(MATRIX, gradient)
    assert not bool(found.solution[0].any()) and not bool(found.broken.any())
    assert (found.iterations[0], float(found.residual[0])) == (0, 0.0)
    assert relative_error(found.solution[1], solved(MATRIX, V)[1]) < 1e-11


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30])
def test_squares_of_small_and_large_gradients_stay_in_range(size: float) -> None:
    found = solve(MATRIX, (size * V).float(), tolerance=1e-5)
    assert relative_error(found.solution.double() / size, solved(MATRIX, V)) < 1e-3  # float32


@pytest.mark.parametrize("spectrum", [[-1.0] * 30, [0.0] * 30, [float("inf")] * 30], ids=["negative", "zero", "inf"])
def test_no_curvature_no_step(spectrum: list[float]) -> None:
    """It says so, and a system that breaks down leaves the others alone."""
    matrix = torch.stack([torch.diag(torch.tensor(spectrum, dtype=torch.float64)), MATRIX[1]])
    found = solve(matrix, V)
    assert found.broken.tolist() == [True, False]
    assert found.iterations[0] == 0
    assert not bool(found.solution[0].any())
    assert relative_error(found.solution[1], solved(MATRIX[1:], V[1:])[0]) < 1e-11


def test_what_was_reached_before_a_breakdown_is_kept() -> None:
    calls = 0

    def failing(V: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return product_with(MATRIX)(V) if calls <= 3 else torch.full_like(V, float("inf"))

    found = conjugate_gradient(failing, V, tolerance=1e-13, max_iterations=10)
    assert found.broken.tolist() == [True, True]
    assert torch.equal(found.solution, solve(MATRIX, V, max_iterations=3).solution)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_said_to_be_broken(value: float) -> None:
    gradient = V.clone()
    gradient[0, 1, 2] = value
    found = solve(MATRIX, gradient)
    assert found.broken.tolist() == [True, False]
    assert relative_error(found.solution[1], solved(MATRIX, V)[1]) < 1e-11
