"""Where the KL clip's learning rate comes from, and when an optimizer's step runs ours."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfdist.errors import ConfigError, KfdistError
from kfdist.runtime.apply.rates import LearningRates, finite_gradients
from tests.support.preconditioning import backward, factors, gradients, preconditioner, two_layers


def test_a_number_and_a_schedule():
    parameter = nn.Parameter(torch.ones(1))
    assert LearningRates(0.25, needed=True).at(7)(parameter) == 0.25
    assert LearningRates(0, needed=True).at(7)(parameter) == 0
    assert LearningRates(lambda step: 0.1 * step, needed=True).at(3)(parameter) == pytest.approx(0.3)
    assert LearningRates(lambda step: torch.tensor(0.5), needed=True).at(3)(parameter) == 0.5  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("bad", [-1.0, float("nan"), None, True, "high"])
def test_a_schedules_bad_value_is_refused_with_its_step(bad: Any):
    rates = LearningRates(lambda step: bad if step == 5 else 0.1, needed=True)
    rates.at(4)
    with pytest.raises(ConfigError, match="lr at step 5: "):
        rates.at(5)


def test_a_schedule_that_fails_is_refused_with_its_step():
    with pytest.raises(ConfigError, match="the lr schedule failed at step 2: IndexError"):
        LearningRates(lambda step: (0.1, 0.2)[step], needed=True).at(2)


def test_only_a_clip_needs_a_learning_rate():
    LearningRates(None, needed=False).at(0)
    with pytest.raises(ConfigError, match=r"pass lr=\.\.\., call attach\(optimizer\), or set kl_clip=None"):
        LearningRates(None, needed=True).at(0)


def test_an_attached_optimizers_rates_per_group_as_a_scheduler_moves_them():
    model: Any = two_layers()
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters(), "lr": torch.tensor(0.25)}]
    optimizer = torch.optim.SGD(groups)
    rates = LearningRates(None, needed=True)
    rates.attach(optimizer, list(model.parameters()), lambda: None)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    seen = []
    for step in range(2):
        at = rates.at(step)
        seen.append([float(at(model[0].weight)), float(at(model[2].bias))])
        optimizer.step()
        scheduler.step()
    assert seen == [pytest.approx([0.5, 0.25]), pytest.approx([0.05, 0.025])]
    assert rates.at(2)(nn.Parameter(torch.ones(1))) == 0.0, "what the optimizer does not step does not move"


def test_a_given_rate_wins_over_the_optimizers():
    model: Any = two_layers()
    rates = LearningRates(0.125, needed=True)
    rates.attach(torch.optim.SGD(model.parameters(), lr=9.0), list(model.parameters()), lambda: None)
    assert rates.at(0)(model[0].weight) == 0.125


# Through the Preconditioner ------------------------------------------------------------------------------------------


def test_a_clip_without_any_rate_is_an_error_at_the_first_step_and_nothing_is_lost():
    model = two_layers()
    with preconditioner(model, kl_clip=1e-3, lr=None) as pre:
        backward(model)
        before = gradients(model)
        with pytest.raises(ConfigError, match="kl_clip is set but there is no learning rate"):
            pre.step()
        assert all(torch.equal(a, b) for a, b in zip(gradients(model), before, strict=True))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pre.attach(optimizer)
        optimizer.step()
        assert pre.next_step == 1


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), torch.optim.AdamW(model.parameters(), lr=0.01)]


@pytest.mark.parametrize("which", [0, 1], ids=["sgd", "adamw"])
@pytest.mark.parametrize("with_closure", [False, True], ids=["", "closure"])
def test_attaching_equals_calling_step(which: int, with_closure: bool):
    """A closure makes the gradients, so our step must come at its end (Lightning steps its optimizers this way)."""
    by_hand, attached = two_layers(), two_layers()
    first, second = optimizers(by_hand)[which], optimizers(attached)[which]
    with preconditioner(by_hand, lr=first.param_groups[0]["lr"]) as a, preconditioner(attached, lr=None) as b:
        assert b.attach(second) is b
        for step in range(4):
            first.zero_grad()
            loss = backward(by_hand, seed=step)
            a.step()
            first.step()

            def closure(step: int = step) -> float:
                second.zero_grad()
                return backward(attached, seed=step)

            if with_closure:
                assert second.step(closure) == loss
            else:
                closure()
                second.step()
        assert (a.next_step, b.next_step) == (4, 4)
    assert all(
        torch.equal(mine, other) for mine, other in zip(by_hand.parameters(), attached.parameters(), strict=True)
    )


def test_a_closure_given_by_name_is_run_too():
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with preconditioner(model, lr=None).attach(optimizer) as pre:
        optimizer.step(closure=lambda: backward(model))
        assert pre.next_step == 1
        assert set(factors(pre)) == {"0", "2"}


def test_the_step_sees_the_rate_that_the_scheduler_set_last():
    """By the clip: where it is active, lr x the clipped step does not depend on lr."""
    steps = []
    for lr in (0.5, 0.05):
        model = two_layers()
        optimizer = torch.optim.SGD(model.parameters(), lr=123.0)
        with preconditioner(model, lr=None, kl_clip=1e-9).attach(optimizer):
            optimizer.param_groups[0]["lr"] = lr
            backward(model)
            optimizer.step()
            steps.append([lr * gradient for gradient in gradients(model)])
    for first, second in zip(*steps, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=0)


def test_a_closed_preconditioner_leaves_the_optimizer_alone():
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with preconditioner(model, lr=None).attach(optimizer) as pre:
        pass
    backward(model)
    before = gradients(model)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), before, strict=True))
    with pytest.raises(KfdistError, match="after close"):
        pre.step()


def test_a_second_optimizer_or_another_models_is_refused():
    model, other = two_layers(), two_layers()
    with preconditioner(model, lr=None) as pre:
        with pytest.raises(ConfigError, match="AdamW steps none of the preconditioned parameters"):
            pre.attach(torch.optim.AdamW(other.parameters()))
        pre.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        with pytest.raises(ConfigError, match="attached already"):
            pre.attach(torch.optim.SGD(model.parameters(), lr=0.1))


def finite(*gradients: Tensor | None) -> bool | None:
    parameters = []
    for gradient in gradients:
        parameter = nn.Parameter(
            torch.zeros(()) if gradient is None else torch.zeros(gradient.shape).to(gradient.dtype)
        )
        parameter.grad = gradient
        parameters.append(parameter)
    found = finite_gradients(parameters)
    return None if found is None else bool(found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_gradients_whose_sum_overflows_are_finite_and_one_bad_number_is_found(dtype: torch.dtype):
    largest = torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype)
    others = (largest, -largest, torch.zeros(0, dtype=dtype), None)
    assert finite(*others) is True
    for bad in (math.inf, -math.inf, math.nan):
        spoiled = largest.clone()
        spoiled[1, 2] = complex(0.0, bad) if dtype.is_complex else bad
        assert finite(*others, spoiled) is False


def test_gradients_of_several_dtypes_and_layouts_are_looked_at_together():
    table = torch.sparse_coo_tensor([[1, 1]], [[1.0, 2.0], [3.0, 4.0]], (3, 2))
    others = (torch.full((2,), 1e300, dtype=torch.float64), torch.ones(2, dtype=torch.float16))
    assert finite(table, *others) is True
    assert finite(table * math.inf, *others) is False
    assert finite(None) is None and finite(torch.zeros(0)) is None
