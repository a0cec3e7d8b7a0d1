"""Notices trained parameters that no block has, also those that are added or thawed after the plan was made."""

import warnings
from collections.abc import Set

from torch import nn

from kfdist.errors import KfdistWarning
from kfdist.runtime.plan.coverage import Coverage, left_out_warning
from kfdist.runtime.plan.layers import bare_parameters


class LeftOutNotice:
    """Warns of each such parameter once, at the first step or when it comes.

    Args:
        period: Steps between two looks at the model.

    Attributes:
        instead: What becomes of them, in words.
    """

    def __init__(self, period: int) -> None:
        self.instead = "They keep their plain gradients"
        self._period = period
        self._steps = 0
        self._said: set[str] = set()

    def look(self, planned: Coverage, model: nn.Module, multiplied: Set[int], *, level: int) -> None:
        """Looks at the model before a step, one in `period`, while it has its gradients.

        Args:
            planned: What is planned of each parameter.
            model: The bare model.
            multiplied: The parameters, by id, that were seen in products.
            level: Whose line the warning shows.
        """
        self._steps += 1
        if (self._steps - 1) % self._period:
            return
        now = planned.as_of_now(model, multiplied)
        left_out = {name: why for name, why in now.left_out().items() if name not in self._said}
        if left_out:
            used = {name for name, parameter in bare_parameters(model) if parameter.grad is not None}
            left_out = {name: why for name, why in left_out.items() if name in used}
        if left_out:
            self._said.update(left_out)
            warnings.warn(left_out_warning(left_out, now.share, self.instead), KfdistWarning, stacklevel=level)
