"""Settings and report of the adaptive step, and the rules that they set: lambda's, and candidates for gamma."""

import math
from dataclasses import dataclass

from kfdist import checks
from kfdist.runtime.settings import StepReport

_BASE = 19 / 20
"""The paper's factor per step, from which both omegas are made (algorithms.md 1.2)."""

_MOST_DOUBLINGS = 5
"""Thirty-two notches at once are a factor of about 3,700 by the paper's omega_1."""

GOOD_RATIO = 3 / 4
BAD_RATIO = 1 / 4


@dataclass(frozen=True, kw_only=True)
class AdaptiveSettings:
    """How damping, momentum and rejection work; the defaults are the paper's (algorithms.md 1.2).

    The paper's T3, the steps between two inversions, is the preconditioner's `inverse_period`.

    Attributes:
        statistics_fraction: tau_1, the share of a batch's examples whose statistics are measured, where `step` is given
            the batch; otherwise statistics are those of the whole batch, sub-sampled as the preconditioner's `sampling`
            says.
        model_fraction: tau_2, the share whose exact F makes the quadratic model, where `step` is given the batch;
            otherwise the whole batch's does.
        damping_period: T1, the steps between two adaptations of lambda.
        damping_factor: omega_1 in (0, 1): lambda falls by this factor, or rises by its inverse.
        smallest_damping: Floor of lambda (and of gamma^2 - eta).
        largest_damping: Ceiling of lambda.
        gamma_search: Whether gamma is chosen among {omega_2 gamma, gamma, gamma/omega_2} every T2 steps; otherwise it
            is sqrt(lambda + eta).
        gamma_period: T2, the steps between two searches.
        gamma_factor: omega_2 in (0, 1).
        momentum: Whether the last step is a second direction of the model.
        rejection: Whether a step that raises the objective, or makes it infinite or NaN, is undone. Where statistics
            are of a part of the batch, such a step is found on that part first, but for those that adapt lambda: it is
            undone if the whole batch agrees.
        differentiation: "forward", "double_backward", or "auto": forward mode until an operator turns out to have no
            forward derivative, for all directions at once where the model is made of a part of the batch and all of it
            can run so. What a model keeps of such a run (`self.log.append(output.detach())`) is a tensor inside
            `torch.func`, which can be neither copied nor saved: give "double_backward" where it keeps something.
    """

    statistics_fraction: float = 1 / 8
    model_fraction: float = 1 / 4
    damping_period: int = 5
    damping_factor: float = _BASE**5
    smallest_damping: float = 1e-8
    largest_damping: float = math.inf
    gamma_search: bool = True
    gamma_period: int = 20
    gamma_factor: float = math.sqrt(_BASE) ** 20
    momentum: bool = True
    rejection: bool = True
    differentiation: str = "auto"

    def __post_init__(self) -> None:
        for name in ("statistics_fraction", "model_fraction"):
            checks.number(name, getattr(self, name), above=0, most=1)
        for name in ("damping_period", "gamma_period"):
            checks.count(name, getattr(self, name), least=1, hint="steps")
        for name in ("damping_factor", "gamma_factor"):
            checks.number(name, getattr(self, name), above=0, below=1)
        smallest = checks.number("smallest_damping", self.smallest_damping, above=0)
        checks.number("largest_damping", self.largest_damping, least=smallest, finite=False, hint="smallest_damping")
        for name in ("gamma_search", "momentum", "rejection"):
            checks.switch(name, getattr(self, name))
        checks.choice("differentiation", self.differentiation, ("auto", "forward", "double_backward"))


@dataclass(frozen=True, kw_only=True)
class AdaptiveReport:
    """What one adaptive step did; equal on all ranks, except for the seconds in `preconditioner`.

    Attributes:
        step: The step, from 0.
        loss: The mean loss over the ranks' batches before the step, without weight decay.
        new_loss: The same after the step, even if that was undone; None if it wasn't measured, as where a part of the
            batch was enough to accept the step.
        rho: Change of the objective over the change that the model without lambda predicted; None if `new_loss` is.
        alpha: Coefficient of the new direction; 0 if the model could not be formed.
        momentum: mu, coefficient of the last step; 0 if there was none.
        damping: lambda of this step.
        gamma: gamma of this step: the direction is (F + gamma^2 I)^-1 grad.
        model_change: M(delta) - M(0), with lambda.
        accepted: Whether the parameters were changed.
        preconditioner: What the preconditioner did.
    """

    step: int
    loss: float
    new_loss: float | None
    rho: float | None
    alpha: float
    momentum: float
    damping: float
    gamma: float
    model_change: float
    accepted: bool
    preconditioner: StepReport


class Trust:
    """lambda, by Levenberg and Marquardt's rule, and gamma from step to step (algorithms.md 1.2, steps 2 and 6).

    Steps count from 1 here, as in the paper, so that neither rule acts before its first period is over.

    Args:
        settings: The rules.
        damping: The first lambda.
        weight_decay: eta.

    Attributes:
        damping: lambda.
        gamma: The factored damping; sqrt(lambda + eta) until a search has moved it.
        rejected: How many steps were rejected in a row.
    """

    def __init__(self, settings: AdaptiveSettings, damping: float, weight_decay: float) -> None:
        self._settings = settings
        self._weight_decay = weight_decay
        self.damping = damping
        self.gamma = math.sqrt(damping + weight_decay)
        self.rejected = 0

    def candidates(self, count: int) -> list[float]:
        """Returns the gammas to try at step number `count`, the present one first."""
        settings = self._settings
        if not settings.gamma_search:
            self.gamma = math.sqrt(self.damping + self._weight_decay)
            return [self.gamma]
        if count % settings.gamma_period:
            return [self.gamma]
        floor = math.sqrt(settings.smallest_damping + self._weight_decay)
        lower = max(self.gamma * settings.gamma_factor, floor)
        return list(dict.fromkeys([self.gamma, lower, self.gamma / settings.gamma_factor]))

    def adapts(self, count: int) -> bool:
        """Tells whether lambda is adapted at step number `count`."""
        return count % self._settings.damping_period == 0

    def adapt(self, rho: float) -> None:
        """Moves lambda by the reduction ratio; NaN (0/0, or a loss that is NaN) raises it."""
        if rho > GOOD_RATIO:
            self._set(self.damping * self._settings.damping_factor)
        elif not rho >= BAD_RATIO:
            self.raise_damping()

    def raise_damping(self) -> None:
        """Raises lambda by one notch."""
        self._set(self.damping / self._settings.damping_factor)

    def accept(self) -> None:
        """A step stands."""
        self.rejected = 0

    def reject(self) -> None:
        """Raises lambda by 1, 2, 4, ... notches at one rejected step after another, each of which was in vain.

        Source: Nielsen (1999), Damping parameter in Marquardt's method.
        """
        self._set(self.damping * self._settings.damping_factor ** -(2.0 ** min(self.rejected, _MOST_DOUBLINGS)))
        self.rejected += 1

    def _set(self, damping: float) -> None:
        self.damping = min(max(damping, self._settings.smallest_damping), self._settings.largest_damping)
