"""However a Preconditioner ends, the model, the optimizer and torch are as they were."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.modules.module as hooks_of_modules
import torch.optim.optimizer as hooks_of_optimizers
from torch import nn

import kfdist
from tests.support.preconditioning import backward, two_layers


def at_with(model: nn.Module, optimizer: torch.optim.Optimizer) -> weakref.ref[Any]:
    with kfdist.Preconditioner(model, "rs-kfac").attach(optimizer) as pre:
        train(model, optimizer)
        return weakref.ref(pre)


def at_close(model: nn.Module, optimizer: torch.optim.Optimizer) -> weakref.ref[Any]:
    pre = kfdist.Preconditioner(model, "rs-kfac").attach(optimizer)
    train(model, optimizer)
    pre.close()
    pre.close()
    return weakref.ref(pre)


def at_an_error(model: nn.Module, optimizer: torch.optim.Optimizer) -> weakref.ref[Any]:
    found: list[weakref.ref[Any]] = []
    with pytest.raises(ValueError, match="the script"), kfdist.Preconditioner(model, "kfac").attach(optimizer) as pre:
        found.append(weakref.ref(pre))
        train(model, optimizer)
        raise ValueError("the script")
    return found[0]


def when_forgotten(model: nn.Module, optimizer: torch.optim.Optimizer) -> weakref.ref[Any]:
    pre = kfdist.Preconditioner(model, "rs-kfac", lr=0.1)
    backward(model)
    pre.step()
    optimizer.step()
    return weakref.ref(pre)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()


def state_of(thing: Any) -> dict[str, Any]:
    return {name: copy.copy(value) for name, value in vars(thing).items()}


def of_torch() -> list[int]:
    kinds = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
    return [
        *(len(getattr(hooks_of_modules, kind)) for kind in kinds),
        len(hooks_of_optimizers._global_optimizer_pre_hooks),
        len(hooks_of_optimizers._global_optimizer_post_hooks),
        torch._C._len_torch_function_stack(),
    ]


@pytest.mark.parametrize("end", [at_with, at_close, at_an_error, when_forgotten])
def test_nothing_is_left(end: Callable[[nn.Module, torch.optim.Optimizer], weakref.ref[Any]]) -> None:
    gc.collect()
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer)
    modules = {name: state_of(module) for name, module in model.named_modules()}
    parameters = {
        name: (set(vars(each)), each._backward_hooks, each._post_accumulate_grad_hooks)
        for name, each in model.named_parameters()
    }
    of_optimizer, before = state_of(optimizer), of_torch()

    gone = end(model, optimizer)
    gc.collect()

    assert gone() is None, "neither the model nor the optimizer nor torch holds it"
    assert {name: state_of(module) for name, module in model.named_modules()} == modules
    for name, each in model.named_parameters():
        assert (set(vars(each)), each._backward_hooks, each._post_accumulate_grad_hooks) == parameters[name]
    for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "param_groups", "defaults"):
        assert state_of(optimizer)[name] == of_optimizer[name]
    if end is when_forgotten:  # the one hook on all optimizers goes with the next that is closed
        kfdist.Preconditioner(two_layers(), "kfac").close()
    assert of_torch() == before
    train(model, optimizer)
