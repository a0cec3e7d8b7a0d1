"""What the adaptive step requires of its arguments and its preconditioner, and why."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from kfdist import checks
from kfdist.comm.communicator import Communicator
from kfdist.curvature.inverter import AbstractInverter
from kfdist.errors import ConfigError
from kfdist.runtime.preconditioner import Preconditioner
from kfdist.runtime.settings import StepReport

LOSSES = ("mse", "cross_entropy", "binary_cross_entropy")
"""Losses that are negative log-likelihoods of a known distribution; the last one takes logits."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the adaptive step uses of a preconditioner.

    Attributes:
        model: The bare model.
        world: The ranks that train together.
        update: Does all of a step except preconditioning the gradients. Collective.
        directions: Returns (F + damping I)^-1 grad for the parameters that have a block; changes nothing.
        paused: Captures nothing of forwards made inside.
        batch: States the number of terms that the next backward's loss averages.
        observe: Measures the "mc" or "exact" Fisher before the backward; None for the empirical one.
    """

    model: nn.Module
    world: Communicator
    update: Callable[[], StepReport]
    directions: Callable[[float], Mapping[nn.Parameter, Tensor]]
    paused: Callable[[], AbstractContextManager[None]]
    batch: Callable[[int], None]
    observe: Callable[[Tensor], None] | None


def check_arguments(loss: str | None, weight_decay: float, damping: float) -> None:
    """Refuses values out of range by `ConfigError`."""
    if loss is not None:
        checks.choice("loss", loss, LOSSES, hint="or None where the closure calls observe itself")
    checks.number("weight_decay", weight_decay, least=0)
    checks.number("damping", damping, above=0)


def source_of(preconditioner: Preconditioner, loss: str | None) -> Source:
    """Checks that a preconditioner fits the adaptive step.

    Args:
        preconditioner: Gives the directions.
        loss: The loss to observe unless its Fisher is the empirical one; None leaves that to the closure.

    Raises:
        ConfigError: It clips or scales the gradients, adopts inverses late, has an optimizer attached, or uses a method
            whose damping is fixed at the inversion or isn't the lambda of F + lambda I.
    """
    settings = preconditioner.settings
    if settings.kl_clip is not None:
        raise ConfigError(
            f"the preconditioner has kl_clip={settings.kl_clip!r}; AdaptiveStep sizes its steps by the quadratic "
            "model: make it with kl_clip=None"
        )
    if settings.lag != 0:
        raise ConfigError(
            f"the preconditioner has adoption={settings.adoption!r}; AdaptiveStep needs the newest inverse at "
            "every step: make it with adoption=kfdist.FixedLag(0)"
        )
    if preconditioner.attached:
        raise ConfigError(
            "an optimizer is attached to the preconditioner; AdaptiveStep replaces it: leave attach() out"
        )
    if preconditioner.grad_scaler is not None:
        raise ConfigError(
            "the preconditioner has a grad_scaler; AdaptiveStep does its own backward without scaling: leave it out, "
            "and use bfloat16 if a smaller dtype is wanted"
        )
    fixed = {
        group.inverter.name: group.name
        for group in preconditioner.groups
        if not group.inverter.produces.damping_at_apply
    }
    if fixed:
        listed = ", ".join(f"{method!r} (block {group!r})" for method, group in fixed.items())
        raise ConfigError(
            f"the damping of {listed} is fixed at the inversion; AdaptiveStep tries several dampings at one step: use "
            'KfacEigen(damping_rule="pi"), which is the same factored damping applied later'
        )
    relative = [group.name for group in preconditioner.groups if _is_relative(group.inverter)]
    if relative:
        raise ConfigError(
            f'blocks {", ".join(map(repr, relative))} have damping_rule="relative", for which damping is a fraction of '
            'the largest eigenvalue; AdaptiveStep tunes the lambda of F + lambda I: use damping_rule="pi"'
        )
    observe = None
    if loss is not None and settings.fisher != "empirical":
        observe = partial(preconditioner.observe, loss=loss)
    return Source(
        model=preconditioner.model,
        world=preconditioner.world,
        update=preconditioner.update,
        directions=preconditioner.directions,
        paused=preconditioner.paused,
        batch=lambda examples: preconditioner.batch(examples=examples),
        observe=observe,
    )


def _is_relative(inverter: AbstractInverter) -> bool:
    return inverter.settings().get("damping_rule") == "relative"
