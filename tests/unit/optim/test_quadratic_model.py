"""The model's minimiser against dense linear algebra."""

import pytest
import torch

from kfdist.optim.quadratic_model import InnerProducts, gram, minimise_model

EXACT = 1e-10
"""Everything is float64 with condition numbers below 1e4."""

ETA, LAMBDA = 0.3, 0.7


def problem(seed: int = 0, d: int = 9, m: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A dense Fisher, a gradient, and directions in columns."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2 * d, d, generator=generator, dtype=torch.float64)
    return (
        rows.T @ rows / (2 * d),
        torch.randn(d, generator=generator, dtype=torch.float64),
        torch.randn(d, m, generator=generator, dtype=torch.float64),
    )


def products(F: torch.Tensor, gradient: torch.Tensor, D: torch.Tensor) -> InnerProducts:
    return InnerProducts(slopes=gradient @ D, fisher=D.T @ F @ D, gram=D.T @ D)


def minimise(F: torch.Tensor, gradient: torch.Tensor, D: torch.Tensor):
    step = minimise_model(products(F, gradient, D), damping=LAMBDA, weight_decay=ETA, relative_accuracy=1e-14)
    assert step is not None
    return step, D @ torch.tensor(step.coefficients, dtype=torch.float64)


def model_value(F: torch.Tensor, gradient: torch.Tensor, delta: torch.Tensor, damping: float) -> float:
    return float(0.5 * delta @ F @ delta + 0.5 * damping * delta @ delta + gradient @ delta)


@pytest.mark.parametrize("m", [1, 2])
def test_the_models_gradient_is_orthogonal_to_the_directions(m: int):
    """Check K5."""
    F, gradient, D = problem(m=m)
    _, delta = minimise(F, gradient, D)
    slope = F @ delta + (LAMBDA + ETA) * delta + gradient
    assert (D.T @ slope).abs().max() < EXACT * gradient.norm() * D.norm()


@pytest.mark.parametrize("m", [1, 2])
def test_the_predicted_changes_are_the_models_own(m: int):
    F, gradient, D = problem(m=m)
    step, delta = minimise(F, gradient, D)
    c = torch.tensor(step.coefficients, dtype=torch.float64)
    assert step.change == pytest.approx(model_value(F, gradient, delta, LAMBDA + ETA), rel=EXACT)
    assert step.change == pytest.approx(float(0.5 * c @ (D.T @ gradient)), rel=EXACT)
    assert step.undamped_change == pytest.approx(model_value(F, gradient, delta, ETA), rel=EXACT)


def test_two_directions_of_a_plane_give_newtons_step():
    F, gradient, D = problem(d=2)
    _, delta = minimise(F, gradient, D)
    newton = -torch.linalg.solve(F + (LAMBDA + ETA) * torch.eye(2, dtype=torch.float64), gradient)
    torch.testing.assert_close(delta, newton, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("factor", [-2.0, 1.0, 1e-6, 0.0])
def test_a_last_step_along_the_new_direction_adds_nothing(factor: float):
    F, gradient, D = problem()
    D[:, 1] = factor * D[:, 0]
    alone, delta_alone = minimise(F, gradient, D[:, :1])
    both, delta = minimise(F, gradient, D)
    torch.testing.assert_close(delta, delta_alone, rtol=EXACT, atol=EXACT)
    assert both.change == pytest.approx(alone.change, rel=EXACT)


def test_the_result_does_not_depend_on_the_directions_lengths():
    F, gradient, D = problem()
    _, delta = minimise(F, gradient, D)
    _, scaled = minimise(F, gradient, D * torch.tensor([1e-9, 1e7], dtype=torch.float64))
    torch.testing.assert_close(scaled, delta, rtol=EXACT, atol=EXACT)


def test_without_a_gradient_there_is_no_step():
    F, gradient, D = problem()
    step, _ = minimise(F, 0.0 * gradient, 0.0 * D)
    assert step.coefficients == (0.0, 0.0)
    assert step.change == step.undamped_change == 0.0


@pytest.mark.parametrize("field", ["slopes", "fisher", "gram"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_gives_no_model(field: str, value: float):
    of = products(*problem())
    getattr(of, field).view(-1)[0] = value
    assert minimise_model(of, damping=LAMBDA, weight_decay=ETA, relative_accuracy=1e-14) is None


def test_inner_products_of_float32_are_summed_in_float64():
    first, second = [torch.full((1000,), 0.1), torch.tensor([[1e4]])], [torch.full((1000,), 0.3), torch.tensor([[1.0]])]
    dots = [
        sum(float((a.double() * b.double()).sum()) for a, b in zip(first, other, strict=True))
        for other in (first, second)
    ]
    found = gram([first, second])
    assert found.dtype == torch.float64
    assert found[0].tolist() == pytest.approx(dots, rel=1e-15)
    assert float(found[1, 0]) == float(found[0, 1])
