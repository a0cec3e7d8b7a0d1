"""The adaptive step on top of a preconditioner that is a formula, so that what it adds can be told apart."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kfdist
from kfdist.comm.communicator import Communicator
from kfdist.errors import CheckpointError, ConfigError, Interrupted, LossNotFinite, ModelChanged
from kfdist.optim.adaptive import AdaptiveStep
from kfdist.optim.adaptive_settings import AdaptiveSettings
from kfdist.optim.output_fisher import NoForwardDerivative
from kfdist.runtime.counters import PipelineCounters

EXACT = 1e-10
"""float64 sums of at most a few hundred terms."""

Closure = Callable[[], tuple[Tensor, Tensor]]


class Formula:
    """Stands in for a preconditioner: its direction is grad/(scale + damping)."""

    settings = SimpleNamespace(kl_clip=None, lag=0, fisher="empirical")
    world = Communicator(None)
    attached, grad_scaler, groups = False, None, ()

    def __init__(self, model: nn.Module, scale: float = 1.0, without: tuple[str, ...] = ()) -> None:
        self.model, self.scale = model, scale
        self.covered = [p for name, p in model.named_parameters() if name not in without]
        self.examples: list[int] = []
        self.updates = 0
        self.pipeline = SimpleNamespace(counters=PipelineCounters(), in_force=SimpleNamespace(fixed={}))
        self.interrupted = False

    def update(self) -> Any:
        self.updates += 1
        if self.interrupted:
            raise Interrupted("somebody asked to stop", reason="stop")

    def directions(self, damping: float) -> dict[nn.Parameter, Tensor]:
        return {p: p.grad / (self.scale + damping) for p in self.covered if p.grad is not None}

    def batch(self, *, examples: int) -> None:
        self.examples.append(examples)

    def paused(self) -> AbstractContextManager[None]:
        return nullcontext()


def stepper(of: nn.Module | Formula, *, weight_decay: float = 0.0, damping: float = 1.0, **settings) -> AdaptiveStep:
    formula = of if isinstance(of, Formula) else Formula(of)
    return AdaptiveStep(
        formula,  # pyright: ignore[reportArgumentType]
        weight_decay=weight_decay,
        damping=damping,
        settings=AdaptiveSettings(**settings),
    )


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def regression(model: nn.Module, inputs: int = 3, outputs: int = 2) -> Closure:
    x, y = draw(20, inputs, seed=1), draw(20, outputs, seed=2)

    def closure() -> tuple[Tensor, Tensor]:
        output = model(x)
        return output, functional.mse_loss(output, y)

    return closure


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


def tanh_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Curve(nn.Module):
    """One parameter w, seen through a function of it."""

    def __init__(self, function: Callable[[Tensor], Tensor], start: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([start], dtype=torch.float64))
        self.function = function

    def closure(self) -> tuple[Tensor, Tensor]:
        output = self.function(self.w).reshape(1, 1)
        return output, functional.mse_loss(output, torch.zeros_like(output))


# The model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_on_a_quadratic_the_reduction_ratio_is_one(weight_decay: float):
    """Check K6: lambda is left out of M while rho is formed."""
    model = linear()
    step = stepper(model, weight_decay=weight_decay, damping=0.5)
    for _ in range(4):
        report = step.step(regression(model))
        assert report.rho == pytest.approx(1.0, abs=EXACT)
        assert report.accepted and report.model_change < 0
    assert report.momentum != 0


def test_on_a_quadratic_without_damping_the_steps_are_conjugate_gradients():
    """With the identity as preconditioner, as many steps as there are parameters reach the minimum."""
    model = linear()
    step = stepper(model, damping=1e-14, smallest_damping=1e-14, gamma_search=False)
    closure = regression(model)
    for _ in range(8):
        report = step.step(closure)
    x, y = draw(20, 3, seed=1), draw(20, 2, seed=2)
    ones = torch.cat([x, torch.ones(20, 1, dtype=x.dtype)], dim=1)
    best = functional.mse_loss(ones @ torch.linalg.lstsq(ones, y).solution, y)
    assert report.new_loss == pytest.approx(float(best), rel=EXACT)


@pytest.mark.parametrize("how", ["forward", "double_backward"])
def test_the_step_minimises_the_model_of_a_network(how: str):
    """Check K5, with the dense F = J^T H J of the whole network."""
    model, eta, damping = tanh_network(), 0.05, 0.3
    step = stepper(model, weight_decay=eta, damping=damping, rejection=False, differentiation=how)
    closure = regression(model)
    step.step(closure)
    start = torch.cat([each.reshape(-1) for each in values(model)])
    last = torch.cat([each.reshape(-1) for each in step.state_dict()["last"].values()])
    output, loss = closure()
    J = torch.stack(
        [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(each, list(model.parameters()), retain_graph=True)])
            for each in output.reshape(-1)
        ]
    )
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))]) + eta * start
    B = J.T @ J * 2 / output.numel() + (damping + eta) * torch.eye(len(start), dtype=torch.float64)
    report = step.step(closure)
    delta = torch.cat([each.reshape(-1) for each in values(model)]) - start
    slope = B @ delta + gradient
    for direction in (gradient, last):  # the formula's direction is a multiple of the gradient
        assert abs(float(slope @ direction)) < EXACT * float(gradient.norm() * direction.norm())
    assert report.model_change == pytest.approx(float(0.5 * delta @ B @ delta + gradient @ delta), rel=EXACT)
    assert report.momentum != 0


def test_without_momentum_there_is_one_direction():
    model = tanh_network()
    step = stepper(model, momentum=False)
    assert [step.step(regression(model)).momentum for _ in range(3)] == [0.0, 0.0, 0.0]


def test_the_best_gamma_is_taken():
    """Of three, each tried alone from the same start."""

    def after_one_step(gamma: float) -> tuple[float, float]:
        model = tanh_network()
        step = stepper(Formula(model, without=("0.weight", "2.bias")), damping=1.0, gamma_period=2)
        step.load_state_dict({**step.state_dict(), "gamma": gamma})  # not searched for at the first step
        report = step.step(regression(model))
        return report.model_change, report.gamma

    model = tanh_network()
    step = stepper(Formula(model, without=("0.weight", "2.bias")), damping=1.0, gamma_period=1, gamma_factor=0.5)
    report = step.step(regression(model))
    best = min(after_one_step(gamma) for gamma in (0.5, 1.0, 2.0))
    assert (report.model_change, report.gamma) == best
    assert best[1] != 1.0
    assert step.state_dict()["gamma"] == report.gamma


def test_parameters_without_a_block_move_along_the_gradient_over_lambda_and_eta():
    model, eta, damping = linear(), 0.5, 2.0
    step = stepper(Formula(model, without=("bias",)), weight_decay=eta, damping=damping, gamma_search=False)
    before = values(model)
    report = step.step(regression(model))
    for parameter, old, scale in zip(model.parameters(), before, (1.0 + damping + eta, damping + eta), strict=True):
        assert parameter.grad is not None
        expected = old - report.alpha * parameter.grad / scale
        torch.testing.assert_close(parameter.detach(), expected, rtol=EXACT, atol=EXACT)


def test_the_gradient_left_behind_is_the_objectives():
    model, eta = linear(), 0.5
    closure = regression(model)
    objective = closure()[1] + eta / 2 * sum(p.square().sum() for p in model.parameters())
    expected = torch.autograd.grad(objective, list(model.parameters()))
    stepper(model, weight_decay=eta).step(closure)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=EXACT, atol=EXACT)


# Trust ----------------------------------------------------------------------------------------------------------------


def test_a_step_that_raises_the_loss_is_taken_back():
    model = Curve(torch.atan, 2.0)  # Newton overshoots: the curve flattens
    step = stepper(Formula(model), damping=1e-3, damping_factor=0.25, gamma_search=False)
    first = step.step(model.closure)
    assert not first.accepted and first.rho is not None and first.rho < 0
    assert first.new_loss is not None and first.new_loss > first.loss
    assert model.w.item() == 2.0
    assert step.damping == 4e-3
    reports = [step.step(model.closure) for _ in range(8)]
    assert all(report.momentum == 0.0 for report in reports[: [r.accepted for r in reports].index(True) + 1])
    assert reports[-1].accepted and abs(model.w.item()) < 2.0
    assert reports[-1].loss <= first.loss


def test_after_a_rejection_momentum_begins_anew():
    model = tanh_network()
    step = stepper(model)
    closure = regression(model)
    step.step(closure)
    assert step.state_dict()["last"] is not None
    start = values(model)

    def worse_anywhere_else() -> tuple[Tensor, Tensor]:
        output, loss = closure()
        return output, loss if same(values(model), start) else loss * math.nan

    assert not step.step(worse_anywhere_else).accepted
    assert step.state_dict()["last"] is None
    assert step.step(closure).momentum == 0.0
    assert step.step(closure).momentum != 0.0


def test_a_step_to_where_the_loss_is_nan_is_taken_back():
    model = Curve(torch.sqrt, 1.0)
    step = stepper(Formula(model), damping=1e-6, gamma_search=False)
    report = step.step(model.closure)
    assert not report.accepted and math.isnan(report.rho or 0.0) and math.isnan(report.new_loss or 0.0)
    assert model.w.item() == 1.0
    assert step.damping > 1e-6


def test_without_rejection_every_step_stands_and_the_loss_is_read_every_period():
    model = Curve(torch.atan, 2.0)
    step = stepper(Formula(model), damping=1e-3, damping_period=2, rejection=False)
    first = step.step(model.closure)
    assert first.accepted and first.new_loss is None and first.rho is None
    assert model.w.item() < -2.0
    second = step.step(model.closure)
    assert second.accepted and second.rho is not None


def test_lambda_falls_where_the_model_is_right():
    model = linear()
    step = stepper(model, damping=1.0, damping_period=3, damping_factor=0.5)
    reports = [step.step(regression(model)) for _ in range(7)]
    assert [report.damping for report in reports] == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25]
    assert [report.step for report in reports] == list(range(7))


def test_directions_that_are_not_finite_change_nothing():
    model = linear()
    before = values(model)
    step = stepper(Formula(model, scale=math.nan))
    report = step.step(regression(model))
    assert not report.accepted and report.alpha == 0.0 and report.new_loss is None
    assert same(values(model), before)
    assert step.damping > 1.0


def test_a_bad_batch_changes_nothing_and_is_told():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    before = values(model) + [buffer.clone() for buffer in model.buffers()]
    formula = Formula(model)
    step = stepper(formula)

    def closure() -> tuple[Tensor, Tensor]:
        output = model(torch.full((5, 3), torch.nan, dtype=torch.float64))
        return output, output.square().mean()

    with pytest.raises(LossNotFinite, match="before step 0"):
        step.step(closure)
    assert same(values(model) + list(model.buffers()), before)
    assert formula.updates == 0 and step.damping == 1.0
    assert step.step(regression(model)).step == 0


def test_a_parameter_that_was_frozen_since_is_refused_by_name_and_nothing_moves():
    model = tanh_network()
    formula = Formula(model)
    step = stepper(formula)
    step.step(regression(model))
    model.get_parameter("2.bias").requires_grad_(False)
    before = values(model)
    with pytest.raises(ModelChanged, match=r"parameter '2\.bias' was frozen after the AdaptiveStep was made"):
        step.step(regression(model))
    assert same(values(model), before) and formula.updates == 1
    model.get_parameter("2.bias").requires_grad_(True)
    assert step.step(regression(model)).step == 1


# The closure ----------------------------------------------------------------------------------------------------------


def test_buffers_and_generators_are_as_after_one_forward():
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).double()

    alone, model = network(), network()
    step = stepper(model, gamma_period=1)
    masks = []
    model[2].register_forward_hook(lambda _module, _inputs, output: masks.append((output != 0).clone()))
    for _ in range(3):
        for parameter, ours in zip(alone.parameters(), model.parameters(), strict=True):
            parameter.data.copy_(ours.data)
        generator = torch.get_rng_state()
        regression(alone)()
        expected = torch.get_rng_state()
        torch.set_rng_state(generator)
        masks.clear()
        step.step(regression(model))
        assert torch.equal(torch.get_rng_state(), expected)
        for name, buffer in alone.named_buffers():
            assert torch.equal(buffer, model.get_buffer(name)), name
        assert len(masks) >= 5
        # torch draws the same mask each time, so what the steps compare is the same function.
        dropped = [set(torch.nonzero(~mask[:, 0]).flatten().tolist()) for mask in masks]
        assert all(each == dropped[0] for each in dropped)


def test_an_interrupted_step_can_be_done_again():
    def after_two_steps(interrupted: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
        formula = Formula(model)
        step = stepper(formula)
        step.step(regression(model))
        if interrupted:
            formula.interrupted = True
            with pytest.raises(Interrupted):
                step.step(regression(model))
            formula.interrupted = False
        assert step.step(regression(model)).step == 1
        return [*values(model), *(buffer.clone() for buffer in model.buffers()), torch.get_rng_state()]

    assert same(after_two_steps(interrupted=True), after_two_steps(interrupted=False))


def test_the_number_of_terms_reaches_the_preconditioner():
    model = linear()
    formula = Formula(model)
    step = stepper(formula)
    step.step(regression(model))
    assert formula.examples == []

    def closure() -> tuple[Tensor, Tensor, int]:
        return *regression(model)(), 40

    step.step(closure)
    assert formula.examples == [40]


class _Cube(torch.autograd.Function):
    """An operator with a double backward and no forward derivative."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


def test_without_a_forward_derivative_the_double_backward_is_used():
    def trained(how: str, cube: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model = tanh_network()
        x, y = draw(20, 3, seed=1), draw(20, 2, seed=2)

        def closure() -> tuple[Tensor, Tensor]:
            output = cube(model(x))
            return output, functional.mse_loss(output, y)

        step = stepper(model, differentiation=how)
        for _ in range(3):
            step.step(closure)
        return values(model)

    expected = trained("forward", lambda z: z**3)
    for parameter, other in zip(trained("auto", _Cube.apply), expected, strict=True):
        torch.testing.assert_close(parameter, other, rtol=EXACT, atol=EXACT)
    with pytest.raises(NoForwardDerivative):
        trained("forward", _Cube.apply)


# State and arguments --------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_uninterrupted_one():
    def fresh() -> tuple[nn.Module, AdaptiveStep]:
        model = tanh_network()
        return model, stepper(model, weight_decay=0.1, gamma_period=2, damping_period=2)

    straight, step = fresh()
    for _ in range(5):
        step.step(regression(straight))
    first, step = fresh()
    for _ in range(3):
        step.step(regression(first))
    state = step.state_dict()
    second, step = fresh()
    second.load_state_dict(first.state_dict())
    step.load_state_dict(state)
    for _ in range(2):
        report = step.step(regression(second))
    assert report.step == 4
    assert same(values(second), values(straight))


def test_a_state_of_another_model_is_refused():
    model = linear()
    step = stepper(model)
    step.step(regression(model))
    with pytest.raises(CheckpointError, match="another|other parameters"):
        stepper(tanh_network()).load_state_dict(step.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "hinge"}, "loss: 'hinge' is not allowed"),
        ({"weight_decay": -1.0}, "weight_decay: -1.0 is not allowed"),
        ({"damping": 0.0}, "damping: 0.0 is not allowed"),
        ({"damping": math.inf}, "damping: inf is not allowed"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        AdaptiveStep(Formula(linear()), **arguments)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (linear().requires_grad_(False), "the model has 2 parameters, and all of them are frozen; .*set requires_grad"),
        (nn.ReLU(), "the model has no parameters; "),
    ],
    ids=["frozen", "without parameters"],
)
def test_a_model_of_which_nothing_is_trained_is_refused(model: nn.Module, message: str):
    with pytest.raises(ConfigError, match=message):
        stepper(model)
    with (
        kfdist.Preconditioner(model, "none", kl_clip=None, adoption=kfdist.FixedLag(0)) as preconditioner,
        pytest.raises(ConfigError, match=message),
    ):
        AdaptiveStep(preconditioner)
    with pytest.raises(ConfigError, match="has no layer that can be preconditioned"):
        AdaptiveStep.for_model(model)
