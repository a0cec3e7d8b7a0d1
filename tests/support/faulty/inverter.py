"""A method whose results change their shape from version to version, and whose inversions a script may have fail."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kfdist.curvature.inverter import Inversion, Outcome
from kfdist.curvature.inverters import INVERTERS, RsKfac
from kfdist.curvature.statistics import KroneckerFactors
from tests.support.faults import reach


@dataclass(frozen=True, kw_only=True)
class Moody(RsKfac):
    """RS-KFAC of rank 1, 2, 3, 1, ..., one further with each good version; so the result depends on `previous`."""

    name: ClassVar[str] = "moody"

    def invert(
        self, factors: KroneckerFactors, *, damping: float, previous: Mapping[str, Tensor], seed: int
    ) -> Inversion:
        for fault in reach("fail", seed=seed):
            return Inversion(preconditioner=None, outcome=Outcome.FAILED, reason=fault.value[0])
        rank = int(previous["rank"]) % 3 + 1 if previous else 1
        plain = RsKfac(rank=rank, oversampling=0, power_iterations=self.power_iterations)
        inversion = plain.invert(factors, damping=damping, previous={}, seed=seed)
        # A rank this low leaves large residuals, which the ladder must not take for a breakdown.
        return replace(inversion, diagnostics={}, state={"rank": torch.tensor(rank)})


def install() -> None:
    """Makes this process's jobs know the method."""
    INVERTERS[Moody.name] = Moody  # pyright: ignore[reportIndexIssue]
