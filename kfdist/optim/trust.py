"""How far the quadratic model is trusted: Levenberg and Marquardt's rule for lambda, and candidates for gamma."""

import math

from kfdist.optim.adaptive_settings import AdaptiveSettings

GOOD_RATIO = 3 / 4
BAD_RATIO = 1 / 4


class Trust:
    """lambda and gamma from step to step (algorithms.md 1.2, steps 2 and 6).

    Steps count from 1 here, as in the paper, so that neither rule acts before its first period is over.

    Args:
        settings: The rules.
        damping: The first lambda.
        weight_decay: eta.

    Attributes:
        damping: lambda.
        gamma: The factored damping; sqrt(lambda + eta) until a search has moved it.
    """

    def __init__(self, settings: AdaptiveSettings, damping: float, weight_decay: float) -> None:
        self._settings = settings
        self._weight_decay = weight_decay
        self.damping = damping
        self.gamma = math.sqrt(damping + weight_decay)

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

    def _set(self, damping: float) -> None:
        self.damping = min(max(damping, self._settings.smallest_damping), self._settings.largest_damping)
