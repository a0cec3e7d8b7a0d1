"""What a preconditioner reads of the optimizer and the scaler."""

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn

from kfdist import checks
from kfdist.errors import ConfigError, KfdistError
from kfdist.runtime.apply.attachment import bare_optimizer, step_before, steps_any
from kfdist.torch_internals import entries_of, was_unscaled

Scalar = float | Callable[[int], float]
"""A number, or a callable of the step."""


def given_at(name: str, value: object, step: int) -> object:
    """Returns a setting or, of a schedule, what it gives at `step`.

    Raises:
        ConfigError: The schedule failed, by whatever it raised.
    """
    if not callable(value):
        return value
    try:
        return value(step)
    except Exception as error:
        raise ConfigError(f"the {name} schedule failed at step {step}: {error!r}") from error


def number_of(value: object) -> float:
    """Returns a number of Python's, numpy's or torch's as a float; NaN of all else, words and truth values included."""
    if isinstance(value, bool) or not isinstance(value, SupportsFloat):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, ArithmeticError, RuntimeError):  # of arrays, say
        return math.nan


class LearningRates:
    """The learning rate of each parameter at a step, for the KL clip.

    Args:
        lr: A number, a callable of the step, or None to read the attached optimizer.
        needed: Whether there is a KL clip, which cannot do without.

    Attributes:
        needed: The same, as of now.
        optimizer: The one that is attached.
    """

    def __init__(self, lr: Scalar | None, *, needed: bool) -> None:
        self._lr = lr
        self.needed = needed
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._to_look_for: Sequence[nn.Parameter] = ()
        self.optimizer: torch.optim.Optimizer | None = None

    def attach(self, optimizer: Any, parameters: Sequence[nn.Parameter], step: Callable[[], object] | None) -> None:
        """From now on, without an `lr`, reads `optimizer`'s, and runs `step` before each of its steps.

        Args:
            optimizer: One that steps at least one of the parameters, or a wrapper of it.
            parameters: Those of the blocks.
            step: What to run: when there are gradients, at the end of a closure where the optimizer is given one. None:
                nothing, the optimizer does it.

        Raises:
            ConfigError: An optimizer is attached already, this one steps none of the parameters, or it has no learning
                rate and one is needed.
        """
        if self.optimizer is not None:
            raise ConfigError("an optimizer is attached already; make one Preconditioner per optimizer")
        bare = bare_optimizer(optimizer, parameters)
        if self.needed and self._lr is None:
            self._of_optimizer(bare)
        self.optimizer, self._hook = bare, None if step is None else step_before(bare, step)
        self._to_look_for = parameters

    def look(self) -> None:
        """Looks, at the first step, whether the optimizer still steps what it did when it was attached.

        Raises:
            ConfigError: It steps other parameters alone, which have no blocks.
        """
        if self.optimizer is not None and not steps_any(self.optimizer, self._to_look_for):
            raise ConfigError(
                f"the {type(self.optimizer).__name__} steps none of the preconditioned parameters any more: others "
                "were put into its groups, as DeepSpeed and FSDP do with shards and Apex with copies, and nothing "
                "would be preconditioned; train without that wrapper of the optimizer"
            )
        self._to_look_for = ()

    def detach(self) -> None:
        """Runs nothing before the optimizer's steps any more; safe to call twice."""
        if self._hook is not None:
            self._hook.remove()
        self.optimizer, self._hook = None, None

    def at(self, step: int) -> Callable[[nn.Parameter], float]:
        """Returns the learning rate at `step` as a function of the parameter.

        Raises:
            ConfigError: One is needed and there is no source, or a schedule failed or gave a value out of range.
        """
        if self._lr is not None:
            given = given_at("lr", self._lr, step)
            value = number_of(given)
            told = given if math.isnan(value) else value
            checks.number(f"lr at step {step}", told, least=0, hint="or a callable of the step")
            return lambda _parameter: value
        if not self.needed:
            return lambda _parameter: 1.0
        if self.optimizer is None:
            raise ConfigError(
                "kl_clip is set but there is no learning rate to clip by; pass lr=..., call attach(optimizer), or set "
                "kl_clip=None"
            )
        return self._of_optimizer(self.optimizer)

    @staticmethod
    def _of_optimizer(optimizer: torch.optim.Optimizer) -> Callable[[nn.Parameter], float]:
        rates: dict[int, Any] = {}
        for group in optimizer.param_groups:
            lr = group.get("lr")
            if not isinstance(lr, Real | Tensor):
                raise ConfigError(
                    f"the learning rate of the {type(optimizer).__name__} is {lr!r}, and the KL clip needs a number; "
                    "pass lr=..., a number or a callable of the step, or set kl_clip=None"
                )
            lr = lr.reshape(()) if isinstance(lr, Tensor) and lr.dim() else lr  # of one number all the same
            rates.update({id(parameter): lr for parameter in group["params"]})
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
    """Returns a boolean scalar on the device: whether all gradients are finite. None without gradients.

    By the extremes of each, since a sum of finite numbers may overflow: one pass over them, and no copy.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    entries = [entries_of(each)[1] if each.is_sparse else each for each in gradients]
    entries = [torch.view_as_real(each.resolve_conj()) if each.is_complex() else each for each in entries]
    if not (entries := [each for each in entries if each.numel()]):
        return None
    return torch.isfinite(torch.stack([extreme for each in entries for extreme in each.aminmax()])).all()
