"""What a preconditioner reads of the optimizer and the scaler."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kfdist import checks
from kfdist.errors import ConfigError, KfdistError
from kfdist.torch_internals import was_unscaled

Scalar = float | Callable[[int], float]
"""A number, or a callable of the step."""


class LearningRates:
    """The learning rate of each parameter at a step, for the KL clip.

    Args:
        lr: A number, a callable of the step, or None to read the attached optimizer.
        needed: Whether there is a KL clip, which cannot do without.
    """

    def __init__(self, lr: Scalar | None, *, needed: bool) -> None:
        self._lr = lr
        self._needed = needed
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self.optimizer: torch.optim.Optimizer | None = None

    def attach(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], step: Callable[[], object]
    ) -> None:
        """From now on, without an `lr`, reads `optimizer`'s, and runs `step` before each of its steps.

        Args:
            optimizer: It has to step at least one of the parameters, if there are any.
            parameters: Those of the blocks.
            step: What to run: when there are gradients, at the end of a closure where the optimizer is given one.

        Raises:
            ConfigError: An optimizer is attached already, or this one steps none of the parameters.
        """
        if self.optimizer is not None:
            raise ConfigError("an optimizer is attached already; make one Preconditioner per optimizer")
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if parameters and not any(id(parameter) in known for parameter in parameters):
            raise ConfigError(
                f"the {type(optimizer).__name__} steps none of the preconditioned parameters; attach the optimizer of "
                "this model, made from model.parameters()"
            )
        self.optimizer = optimizer
        self._hook = optimizer.register_step_pre_hook(partial(_step_before_optimizer, step))

    def detach(self) -> None:
        """Runs nothing before the optimizer's steps any more; safe to call twice."""
        if self._hook is not None:
            self._hook.remove()

    def at(self, step: int) -> Callable[[nn.Parameter], float]:
        """Returns the learning rate at `step` as a function of the parameter.

        Raises:
            ConfigError: One is needed and there is no source, or a schedule gave a value out of range.
        """
        if self._lr is not None:
            value = float(self._lr(step) if callable(self._lr) else self._lr)
            checks.number(f"lr at step {step}", value, least=0, hint="or a callable of the step")
            return lambda _parameter: value
        if self.optimizer is not None:
            return self._of_optimizer(self.optimizer)
        if self._needed:
            raise ConfigError(
                "kl_clip is set but there is no learning rate to clip by; pass lr=..., call attach(optimizer), or set "
                "kl_clip=None"
            )
        return lambda _parameter: 1.0

    @staticmethod
    def _of_optimizer(optimizer: torch.optim.Optimizer) -> Callable[[nn.Parameter], float]:
        rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        # A parameter that the optimizer does not know does not move: it adds nothing to the clip's sum.
        return lambda parameter: rates.get(id(parameter), 0.0)


def finite_step(
    scaler: torch.amp.GradScaler | None, optimizer: torch.optim.Optimizer | None, parameters: Iterable[nn.Parameter]
) -> Tensor | None:
    """Returns a boolean scalar on the device: whether a scaled backward gave finite gradients; None without a scaler.

    Checks that `scaler.unscale_` has been called since the last update. An overflow check alone is not enough: for a
    fused optimizer the scaler leaves the unscaling to its kernel.

    Raises:
        KfdistError: The gradients are still multiplied by the scale.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    if not was_unscaled(scaler, optimizer):
        raise KfdistError(
            "the gradients are still multiplied by the GradScaler's scale; call scaler.unscale_(optimizer) before "
            "preconditioner.step()"
        )
    return finite_gradients(parameters)


def finite_gradients(parameters: Iterable[nn.Parameter]) -> Tensor | None:
    """Returns a boolean scalar on the device: whether all gradients are finite. None without gradients."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return None
    total = torch.stack([gradient.float().sum() for gradient in gradients]).sum()
    return torch.isfinite(total)


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
