"""Hooks on optimizers: a step before each of theirs, and a look at who steps them."""

import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from kfdist.errors import ConfigError, KfdistWarning
from kfdist.runtime.plan.groups import BlockGroup


def bare_optimizer(optimizer: Any, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Returns the torch optimizer inside wrappers that keep it as `optimizer`, as Accelerate's and Lightning's do.

    Args:
        optimizer: It, or what wraps it.
        parameters: It has to step at least one of these, if there are any.

    Raises:
        ConfigError: There is none inside, or it steps none of the parameters.
    """
    bare = optimizer
    while (inner := getattr(bare, "optimizer", None)) is not None:
        bare = inner
    if not isinstance(bare, torch.optim.Optimizer):
        raise ConfigError(
            f"attach() got a {type(optimizer).__name__}; a torch.optim.Optimizer is needed, or what wraps one as its "
            "`optimizer`; with another one, call preconditioner.step() before each of its steps"
        )
    if not steps_any(bare, parameters):
        raise ConfigError(
            f"the {type(bare).__name__} steps none of the preconditioned parameters; attach the optimizer of this "
            "model, made from model.parameters(); where it steps copies of them (DeepSpeed, Apex's FP16_Optimizer), "
            "call preconditioner.step() before each of its steps"
        )
    return bare


def steps_any(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> bool:
    """Says whether an optimizer steps at least one of some parameters, if there are any."""
    if not parameters:
        return True
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return any(id(parameter) in known for parameter in parameters)


def step_before(optimizer: torch.optim.Optimizer, step: Callable[[], object]) -> RemovableHandle:
    """Runs `step` before each step of an optimizer, or at the end of the closure that it is given."""
    return optimizer.register_step_pre_hook(partial(_step_before_optimizer, step))


def _step_before_optimizer(
    step: Callable[[], object], _optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Runs `step` when an optimizer's step has gradients: now, or at the end of its closure, which makes them.

    Args:
        step: What to run.
        _optimizer: As torch gives it to a step pre-hook.
        args: The optimizer, and the closure if it was given by position.
        kwargs: The closure if it was given by name.

    Returns:
        The arguments with another closure, None without one.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        step()
        return None

    def closure_and_step() -> Any:
        loss = closure()
        step()
        return loss

    if len(args) > 1:
        return (args[0], closure_and_step, *args[2:]), kwargs
    return args, {**kwargs, "closure": closure_and_step}


class ScalerNotice:
    """Looks once who steps the optimizer of some parameters, and warns of a GradScaler that wasn't given.

    The gradients of such a step are unscaled by then, but what was measured is of a loss that is some ten thousand
    times too large. A hook on all optimizers sees it, whoever called whom.

    Args:
        parameters: The preconditioned ones.
        given: The scaler that is known, or None.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], given: torch.amp.GradScaler | None) -> None:
        self._parameters = {id(parameter) for parameter in parameters}
        self._given = given
        self.done = not parameters
        if parameters:
            _looking.add(self)
            if not _hooks:
                _hooks.append(register_optimizer_step_pre_hook(_look))

    def close(self) -> None:
        """Looks no more; safe to call twice. Not to be called by a hook on all optimizers, which this may remove."""
        self.done = True
        if all(notice.done for notice in _looking):
            _looking.clear()
            while _hooks:
                _hooks.pop().remove()

    def look(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer is about to step."""
        stepped = (id(parameter) for group in optimizer.param_groups for parameter in group["params"])
        if self.done or self._parameters.isdisjoint(stepped):
            return
        self.done = True
        scaler = _calling_scaler()
        if scaler is not None and scaler is not self._given:
            given = "another one" if self._given is not None else "none"
            warnings.warn(
                f"a GradScaler (of scale {scaler.get_scale():g}) steps the {type(optimizer).__name__}, and the "
                f"Preconditioner was given {given}: what it measures is of the scaled loss, so that its directions are "
                "next to nothing; pass Preconditioner(..., grad_scaler=scaler)",
                KfdistWarning,
                stacklevel=2,
            )


_looking: "weakref.WeakSet[ScalerNotice]" = weakref.WeakSet()
_hooks: list[RemovableHandle] = []
"""At most one, for all that look: torch goes through its hooks while a forgotten one of them may be collected."""


def _look(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    for notice in list(_looking):
        notice.look(optimizer)


def _calling_scaler() -> torch.amp.GradScaler | None:
    """Returns the GradScaler in whose `step` we are, by the frames that called us."""
    frame = sys._getframe(1)  # noqa: SLF001 the documented way of the standard library
    while frame is not None:
        if frame.f_globals.get("__name__") == torch.amp.GradScaler.__module__:
            scaler = frame.f_locals.get("self")
            if isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled():
                return scaler
        frame = frame.f_back
    return None


def warn_of_normalised(groups: Sequence[BlockGroup], optimizer: torch.optim.Optimizer | None) -> None:
    """Warns of an optimizer that gives directions a size or momentum which those of some methods have already."""
    named = sorted({group.inverter.name for group in groups if group.inverter.produces.normalised})
    plain = isinstance(optimizer, torch.optim.SGD) and not any(each["momentum"] for each in optimizer.param_groups)
    if named and not plain:
        text = (
            f"directions of {', '.join(named)} have Adam's size and momentum already, and {type(optimizer).__name__} "
            "gives them its own besides: use kfdist.Optimizer(model, lr=AdamW's), or SGD without momentum at that rate"
        )
        warnings.warn(text, KfdistWarning, stacklevel=3)
