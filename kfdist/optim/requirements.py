"""What the adaptive step requires of its arguments and its preconditioner, and why."""

from kfdist import checks
from kfdist.errors import ConfigError
from kfdist.runtime.preconditioner import Preconditioner

FIXED = ("damping", "kl_clip", "adoption", "lag", "soft_bound", "hard_bound", "at_hard_bound")
"""Settings of the preconditioner that can't be changed while the adaptive step trains the model."""

LOSSES = ("mse", "cross_entropy", "binary_cross_entropy")
"""Losses that are negative log-likelihoods of a known distribution; the last one takes logits."""


def check_arguments(
    preconditioner: Preconditioner, loss: str | None, weight_decay: float, damping: float | None, *, gamma_search: bool
) -> None:
    """Checks that the values are in range and that the preconditioner fits the adaptive step.

    Raises:
        ConfigError: A value is out of range; or the model has no parameter that is trained; or the preconditioner
            clips or scales the gradients, adopts inverses when they happen to arrive, has an optimizer attached, or
            uses a method that has no damping, or whose damping isn't the lambda of F + lambda I or, though gamma is
            searched for, is fixed at the inversion.
    """
    if loss is not None:
        checks.choice("loss", loss, LOSSES, hint="or None where the closure calls observe itself")
    checks.number("weight_decay", weight_decay, least=0)
    if damping is not None:
        checks.number("damping", damping, above=0)
    _check_trained(preconditioner)
    settings = preconditioner.settings
    if settings.kl_clip is not None:
        raise ConfigError(
            f"the preconditioner has kl_clip={settings.kl_clip!r}; AdaptiveStep sizes its steps by the quadratic "
            "model: make it with kl_clip=None"
        )
    if settings.lag is None:
        raise ConfigError(
            f"the preconditioner has adoption={settings.adoption!r}; AdaptiveStep's decisions follow from its inverses "
            "and must be repeatable: make it with adoption=kfdist.FixedLag(0), or a few steps more where others invert"
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
    others = [group.name for group in preconditioner.groups if not group.inverter.produces.solves]
    if others:
        raise ConfigError(
            f"blocks {', '.join(map(repr, others))} have a method whose directions have a size of their own; "
            "AdaptiveStep needs (F + lambda I)^-1 of the gradient: use kfac-eigen or ekfac"
        )
    fixed = {
        group.inverter.name: group.name
        for group in preconditioner.groups
        if not group.inverter.produces.damping_at_apply
    }
    if fixed and gamma_search:
        listed = ", ".join(f"{method!r} (block {group!r})" for method, group in fixed.items())
        raise ConfigError(
            f"the damping of {listed} is fixed at the inversion, and a search for gamma tries several dampings at one "
            'step: use KfacEigen(damping_rule="pi"), which is the same factored damping applied later, or '
            "settings=AdaptiveSettings(gamma_search=False)"
        )
    relative = [
        group.name for group in preconditioner.groups if group.inverter.settings().get("damping_rule") == "relative"
    ]
    if relative:
        raise ConfigError(
            f'blocks {", ".join(map(repr, relative))} have damping_rule="relative", for which damping is a fraction of '
            'the largest eigenvalue; AdaptiveStep tunes the lambda of F + lambda I: use damping_rule="pi"'
        )


def _check_trained(preconditioner: Preconditioner) -> None:
    trained = [parameter.requires_grad for parameter in preconditioner.model.parameters()]
    if not any(trained):
        of_them = f"{len(trained)} parameters, and all of them are frozen" if trained else "no parameters"
        raise ConfigError(
            f"the model has {of_them}; AdaptiveStep moves those that are trained when it is made: set requires_grad of "
            "what is to be trained, before the preconditioner is made"
        )
