"""The adaptive step that is given its batch: it measures curvature on a part, and is a step on all of it otherwise."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import kfdist
from kfdist.errors import ConfigError, KfdistError

EXAMPLES = 64


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def problem() -> tuple[Tensor, Tensor]:
    x = torch.randn(EXAMPLES, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        y = network(seed=5)(x)
    return x * torch.tensor([10.0, 3.0, 1.0, 0.3, 0.1, 0.03]).double(), (y - y.mean(0)) / y.std(0)


def closure_of(
    model: nn.Module, calls: list[tuple[Tensor, bool]] | None = None
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def closure(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if calls is not None:
            calls.append((x[:, 0].detach().clone(), torch.is_grad_enabled()))
        output = model(x)
        return output, functional.mse_loss(output, y)

    return closure


def adaptive(model: nn.Module, fisher: Any = "mc", method: Any = "kfac", lag: int = 0, **settings: Any) -> Any:
    preconditioner = kfdist.Preconditioner(
        model,
        method,
        factor_period=1,
        inverse_period=2,
        fisher=fisher,
        kl_clip=None,
        sampling=kfdist.Sampling(examples_fraction=1.0),
        adoption=kfdist.FixedLag(lag),
    )
    late = method != "kfac"
    return kfdist.AdaptiveStep(
        preconditioner, damping=0.01, settings=kfdist.AdaptiveSettings(gamma_search=late, **settings)
    )


def test_curvature_is_measured_on_parts_that_share_no_example_and_change_with_the_step():
    model, calls, (x, y) = network(), [], problem()
    seen: list[tuple[frozenset[float], frozenset[float]]] = []
    with adaptive(model) as step:
        for _ in range(3):
            calls.clear()
            step.step(closure_of(model, calls), x, y)
            sizes = [len(rows) for rows, _ in calls]
            assert sizes[:3] == [EXAMPLES, EXAMPLES // 8, EXAMPLES // 4]  # the loss, statistics, the model's F
            assert sum(sizes[3:]) <= EXAMPLES * (1 / 4 + 1)  # all Jacobian products came with F; the loss afterwards
            statistics, of_model = (frozenset(calls[i][0].tolist()) for i in (1, 2))
            assert not statistics & of_model
            seen.append((statistics, of_model))
    assert len(set(seen)) == 3


def test_a_part_is_enough_to_accept_a_step_and_the_whole_batch_judges_those_that_adapt_lambda():
    model, calls, (x, y) = network(), [], problem()
    judged: list[bool] = []
    with adaptive(model, damping_period=5) as step:
        for _ in range(10):
            calls.clear()
            report = step.step(closure_of(model, calls), x, y)
            assert report.accepted and (report.new_loss is None) == (report.rho is None)
            judged.append(report.new_loss is not None)
            last, of_statistics = calls[-1][0], calls[1][0]
            assert torch.equal(last, x[:, 0] if judged[-1] else of_statistics)
    assert judged[4] and judged[9] and judged.count(False) >= 6


class _InItsOwnWay(torch.autograd.Function):
    """The identity, with a derivative of its own in forward mode and none for several directions at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient * 1.0

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tangent * 1.0


def test_what_cannot_run_with_all_directions_at_once_is_run_with_one_after_the_other():
    def trained(last: Callable[[Tensor], Tensor], **settings: Any) -> tuple[list[Tensor], list[int]]:
        model, sizes = network(), []

        def closure(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            sizes.append(len(x))
            output = last(model(x))
            return output, functional.mse_loss(output, y)

        with adaptive(model, gamma_period=2, method=kfdist.KfacEigen(damping_rule="pi"), **settings) as step:
            for _ in range(4):
                step.step(closure, *problem())
        return [p.detach().clone() for p in model.parameters()], sizes

    together, few = trained(lambda z: z)
    apart, many = trained(lambda z: z, differentiation="forward")
    fallen_back, _ = trained(_InItsOwnWay.apply)
    quarter = EXAMPLES // 4
    # Two steps without and two with a search for gamma; from the second step on there is a last step.
    assert many.count(quarter) - few.count(quarter) == (1 + 4 + 2 + 4)
    for others in (apart, fallen_back):
        for parameter, other in zip(together, others, strict=True):
            torch.testing.assert_close(parameter, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("worse_everywhere", [False, True])
def test_a_step_that_is_worse_on_a_part_is_undone_if_the_whole_batch_agrees(worse_everywhere: bool):
    model, (x, y) = network(), problem()
    with adaptive(model, damping_period=100) as step:
        step.step(closure_of(model), x, y)
        start = [p.detach().clone() for p in model.parameters()]
        damping = step.damping

        def elsewhere(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            output, loss = closure_of(model)(x, y)
            moved = not all(map(torch.equal, start, [p.detach() for p in model.parameters()]))
            # Jacobian products move nothing, but run on other tensors: their loss isn't looked at.
            return output, loss * 100 if moved and (worse_everywhere or len(x) < EXAMPLES) else loss

        report = step.step(elsewhere, x, y)
        assert report.accepted != worse_everywhere and report.new_loss is not None
        assert all(map(torch.equal, start, [p.detach() for p in model.parameters()])) == worse_everywhere
        assert (step.damping > damping) == worse_everywhere


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_statistics_come_from_their_part_and_the_gradient_from_all_examples(fisher: str):
    model, calls, (x, y) = network(), [], problem()
    with adaptive(model, fisher) as step:
        step.step(closure_of(model, calls), x, y)
        sums = step.preconditioner.pipeline.reducer.sums
        assert {float(each.counts["n_examples"]) for each in sums.values()} == {EXAMPLES // 8}
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    fresh = network()
    closure_of(fresh)(x, y)[1].backward()
    for gradient, parameter in zip(gradients, fresh.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=0)


def test_the_whole_batch_as_its_own_part_is_the_step_without_one():
    (x, y), results = problem(), []
    for given in (True, False):
        model = network()
        closure = closure_of(model)
        with adaptive(model, "empirical", statistics_fraction=1.0, model_fraction=1.0) as step:
            for _ in range(5):
                report = step.step(closure, x, y) if given else step.step(lambda: closure(x, y))  # noqa: B023
        results.append([*(p.detach() for p in model.parameters()), torch.tensor(report.loss)])
    for with_batch, without in zip(*results, strict=True):
        assert torch.equal(with_batch, without)


def test_a_step_taken_up_again_draws_the_same_examples():
    (x, y), model, again = problem(), network(), network()
    with adaptive(model) as step:
        for number in range(6):
            if number == 3:
                saved = step.preconditioner.state_dict(), step.state_dict()
                again.load_state_dict(model.state_dict())
            step.step(closure_of(model), x, y)
    with adaptive(again) as resumed:
        resumed.preconditioner.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        for _ in range(3):
            resumed.step(closure_of(again), x, y)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("lag", [0, 2])
def test_damping_fixed_at_the_inversion_trains_also_with_inverses_that_come_later(lag: int):
    model, (x, y) = network(), problem()
    before = closure_of(model)(x, y)[1].item()
    with adaptive(model, lag=lag) as step:
        reports = [step.step(closure_of(model), x, y) for _ in range(40)]
        assert {report.gamma for report in reports} != {reports[0].gamma}  # sqrt(lambda + eta), which falls
    assert closure_of(model)(x, y)[1].item() < 0.05 * before


def test_one_made_for_a_model_finds_its_first_damping_and_trains():
    """lambda begins at the mean curvature: within a factor of 3, as it is seen along a single random direction."""
    model, (x, y) = network(), problem()
    output = model(x)
    jacobian = [
        torch.autograd.grad(output[i, j], list(model.parameters()), retain_graph=True)
        for i in range(64)
        for j in range(3)
    ]
    trace = sum(float(g.square().sum()) for row in jacobian for g in row) * 2 / output.numel()
    mean = trace / sum(p.numel() for p in model.parameters())
    before = functional.mse_loss(output, y).item()
    with kfdist.AdaptiveStep.for_model(model, "mse", seed=3) as step:
        reports = [step.step(closure_of(model), x, y) for _ in range(60)]
    assert mean / 3 < reports[0].damping < 3 * mean
    assert closure_of(model)(x, y)[1].item() < 0.02 * before
    with pytest.raises(KfdistError, match="close"):
        step.step(closure_of(model), x, y)


def test_what_is_no_batch_is_refused_before_anything_runs():
    model, calls, (x, y) = network(), [], problem()
    closure: Any = closure_of(model, calls)
    with adaptive(model) as step:
        with pytest.raises(KfdistError, match=r"argument 2 of the batch is of type list"):
            step.step(closure, x, y.tolist())
        with pytest.raises(KfdistError, match=r"\(64, 6\), \(63, 3\); equally many examples"):
            step.step(closure, x, y[1:])
        with pytest.raises(KfdistError, match="at least 1"):
            step.step(closure, x[:0], y[:0])
    assert not calls
    for value in (0.0, 1.5):
        with pytest.raises(ConfigError, match="statistics_fraction"):
            kfdist.AdaptiveSettings(statistics_fraction=value)


def test_parts_of_a_small_batch_have_two_examples_and_an_error_leaves_the_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    (x, y), sizes = problem(), []

    def closure(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(x))
        if len(sizes) == 6 + 2:
            raise ValueError("no such examples")
        output = model(x)
        return output, functional.mse_loss(output, y)

    with adaptive(model) as step:
        step.step(closure, x[:5], y[:5])
        assert sizes[:3] == [5, 2, 2]
        del sizes[6:]
        while len(sizes) < 6:
            sizes.append(0)
        with pytest.raises(ValueError, match="no such examples"):
            step.step(closure, x[:5], y[:5])
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("made_first", [True, False])
def test_torchs_averaged_model_averages_the_iterates_of_growing_batches(made_first: bool):
    model, (x, y), decay = network(), problem(), 0.9

    def averaged_model() -> AveragedModel:
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))

    averaged = averaged_model() if made_first else None
    before = closure_of(model)(x, y)[1].item()
    with kfdist.AdaptiveStep.for_model(model, "mse", seed=3) as step:
        averaged = averaged or averaged_model()
        expected: list[Tensor] = []
        for number in range(30):
            size = min(round(16 ** (1 - number / 20) * EXAMPLES ** (number / 20)), EXAMPLES)
            step.step(closure_of(model), x[:size], y[:size])
            averaged.update_parameters(model)
            now = [p.detach().clone() for p in model.parameters()]
            expected = [decay * e + (1 - decay) * p for e, p in zip(expected, now, strict=True)] if expected else now
            if number == 15:  # evaluated in between, with or without gradients, it is no part of what is measured
                closure_of(averaged)(x, y)[1].backward()
    for average, parameter in zip(averaged.parameters(), expected, strict=True):
        torch.testing.assert_close(average.detach(), parameter, rtol=1e-12, atol=1e-12)
    assert closure_of(averaged)(x, y)[1].item() < 0.5 * before  # seen: 0.21
