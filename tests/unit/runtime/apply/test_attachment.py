"""Which optimizers can be attached, and what is noticed of those that step."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.optim.optimizer as optimizer_module
from torch import nn

import kfdist
from kfdist.errors import ConfigError, KfdistError, KfdistWarning
from tests.support.preconditioning import backward, preconditioner, rows, two_layers

# Wrapped optimizers, and unusual ones ---------------------------------------------------------------------------------


class Wrapper:
    """As Accelerate's and Lightning's: no optimizer itself, and steps what it holds."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step()


class WrappingOptimizer(torch.optim.Optimizer):
    """As Accelerate's own: of the class itself."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


@pytest.mark.parametrize("wrap", [Wrapper, WrappingOptimizer, lambda each: Wrapper(Wrapper(each))])
def test_the_optimizer_inside_wrappers_is_attached(wrap: Callable[[Any], Any]):
    model = two_layers()
    wrapped = wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    with preconditioner(model, lr=None).attach(wrapped) as pre:
        backward(model)
        wrapped.step()
        assert pre.next_step == 1


@pytest.mark.parametrize("other", [object(), Wrapper(object()), None, [1]])
def test_what_holds_no_torch_optimizer_is_refused_with_the_remedy(other: Any):
    with (
        preconditioner(two_layers(), lr=None) as pre,
        pytest.raises(ConfigError, match=r"call preconditioner\.step\(\)"),
    ):
        pre.attach(other)


def sharded(optimizer: torch.optim.Optimizer) -> None:
    """As DeepSpeed's ZeRO does, and Apex with copies in float32."""
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(torch.cat([p.detach().flatten() for p in group["params"]]))]


@pytest.mark.parametrize("own", [False, True])
def test_an_optimizer_whose_parameters_were_replaced_is_refused_before_anything_moves(own: bool):
    model = two_layers()
    if own:
        optimizer: Any = kfdist.Optimizer(model)
        pre = optimizer.preconditioner
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pre = preconditioner(model, lr=None).attach(optimizer)
    with pre:
        kept = [list(group["params"]) for group in optimizer.param_groups]
        sharded(optimizer)
        backward(model)
        before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        for _ in range(2):
            with pytest.raises(ConfigError, match="none of the preconditioned parameters any more.*DeepSpeed"):
                optimizer.step()
        after = [p for group in optimizer.param_groups for p in group["params"]]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and pre.next_step == 0
        for group, parameters in zip(optimizer.param_groups, kept, strict=True):
            group["params"] = parameters
        optimizer.step()
        assert pre.next_step == 1


class WithoutRate(torch.optim.SGD):
    """Finds its own step sizes, as Adafactor does with relative_step."""

    def __init__(self, parameters: Any, *, rate: object) -> None:
        super().__init__(parameters, lr=0.1)
        for group in self.param_groups:
            group["lr"] = rate

    def step(self, closure: Any = None) -> None:
        del closure


@pytest.mark.parametrize("rate", [None, "auto"])
def test_an_optimizer_without_a_learning_rate_is_refused_where_the_clip_needs_one(rate: object):
    model = two_layers()
    optimizer = WithoutRate(model.parameters(), rate=rate)
    with preconditioner(model, lr=None) as pre:
        with pytest.raises(ConfigError, match=r"the learning rate of the WithoutRate is .*pass lr="):
            pre.attach(optimizer)
        assert not pre.attached
    for given in ({"lr": 0.1}, {"lr": None, "kl_clip": None}):
        with preconditioner(model, **given).attach(optimizer) as pre:
            backward(model)
            optimizer.step()
            assert pre.next_step == 1


def test_learning_rates_that_are_tensors_are_taken():
    stepped = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        model = two_layers()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        with preconditioner(model, lr=None, kl_clip=1e-6).attach(optimizer):
            backward(model)
            optimizer.step()
        stepped.append([parameter.detach().clone() for parameter in model.parameters()])
    for number, tensor in zip(*stepped, strict=True):
        torch.testing.assert_close(number, tensor, rtol=1e-12, atol=0)


@pytest.mark.parametrize("call", ["step", "update"])
def test_a_step_by_hand_beside_an_attached_optimizer_is_refused(call: str):
    model = two_layers()
    with preconditioner(model, lr=None).attach(torch.optim.SGD(model.parameters(), lr=0.1)) as pre:
        backward(model)
        with pytest.raises(KfdistError, match=rf"leave out {call}\(\), or attach\(\)"):
            getattr(pre, call)()
        assert pre.next_step == 0


# A GradScaler that wasn't given ---------------------------------------------------------------------------------------


def scaled_step(model: nn.Module, optimizer: Any, scaler: torch.amp.GradScaler, by_hand: Any = None) -> None:
    optimizer.zero_grad()
    x, y = rows()
    scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
    if by_hand is not None:
        by_hand.step()
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_grad_scaler_that_was_not_given_is_warned_of_once(by_hand: bool):
    model, scaler = two_layers(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with preconditioner(model) as pre:
        if not by_hand:
            pre.attach(optimizer)
        with pytest.warns(KfdistWarning, match=r"GradScaler \(of scale 1024\).*grad_scaler=scaler"):
            scaled_step(model, optimizer, scaler, pre if by_hand else None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scaled_step(model, optimizer, scaler, pre if by_hand else None)


def test_a_grad_scaler_is_no_news_where_it_was_given_is_off_or_steps_another_model():
    other = two_layers()
    others = torch.optim.SGD(other.parameters(), lr=0.1)
    for how in ("given", "off", "another"):
        model = two_layers()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=how != "off")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with preconditioner(model, grad_scaler=scaler if how == "given" else None).attach(optimizer) as pre:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                if how == "another":
                    scaled_step(other, others, scaler)
                    backward(model)
                    optimizer.step()
                else:
                    scaled_step(model, optimizer, scaler)
            assert pre.next_step == 1


def test_the_hook_on_all_optimizers_is_gone_after_the_first_steps_and_after_close():
    hooks = optimizer_module._global_optimizer_pre_hooks
    before = len(hooks)
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with preconditioner(model).attach(optimizer), preconditioner(two_layers()):
        assert len(hooks) == before + 1
    assert len(hooks) == before
    with preconditioner(model).attach(optimizer):
        for _ in range(2):
            backward(model)
            optimizer.step()
        assert len(hooks) == before
