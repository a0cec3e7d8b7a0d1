"""What a preconditioner reads of the optimizer and the scaler."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from kfdist.errors import ConfigError, KfdistError


class LearningRates:
    """The learning rate of each parameter at a step, for the KL clip.

    Args:
        lr: A number, a callable of the step, or None to read the attached optimizer.
        needed: Whether there is a KL clip, which cannot do without.
    """

    def __init__(self, lr: float | Callable[[int], float] | None, *, needed: bool) -> None:
        self._lr = lr
        self._needed = needed
        self.optimizer: torch.optim.Optimizer | None = None

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on, without an `lr`, reads `optimizer`'s."""
        self.optimizer = optimizer

    def at(self, step: int) -> Callable[[nn.Parameter], float]:
        """Returns the learning rate at `step` as a function of the parameter.

        Raises:
            ConfigError: One is needed and there is no source.
        """
        if self._lr is not None:
            value = float(self._lr(step) if callable(self._lr) else self._lr)
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


def unscaled(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer | None) -> None:
    """Checks that `scaler.unscale_` has been called since the last update.

    Raises:
        KfdistError: The gradients are still multiplied by the scale.
    """
    states = scaler._per_optimizer_states
    relevant = [states[id(optimizer)]] if optimizer is not None else list(states.values())
    if not any(state["found_inf_per_device"] for state in relevant):
        raise KfdistError(
            "the gradients are still multiplied by the GradScaler's scale; call scaler.unscale_(optimizer) before "
            "preconditioner.step()"
        )


def finite_gradients(parameters: Iterable[nn.Parameter]) -> Tensor | None:
    """Returns a boolean scalar on the device: whether all gradients are finite. None without gradients."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return None
    total = torch.stack([gradient.float().sum() for gradient in gradients]).sum()
    return torch.isfinite(total)
