"""A test's inverter: its rank grows and wraps around from version to version, and some inversions fail."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kfdist.curvature.inverter import Inversion, Outcome
from kfdist.curvature.inverters import INVERTERS, RsKfac
from kfdist.curvature.statistics import KroneckerFactors


@dataclass(frozen=True, kw_only=True)
class Moody(RsKfac):
    """RS-KFAC of rank 1, 2, 3, 1, ..., one further with each good version; so the result depends on `previous`.

    Attributes:
        fails_one_in: An inversion fails where its seed is a multiple of this; 0: none does.
    """

    name: ClassVar[str] = "moody"

    fails_one_in: int = 0

    def invert(
        self, factors: KroneckerFactors, *, damping: float, previous: Mapping[str, Tensor], seed: int
    ) -> Inversion:
        if self.fails_one_in and seed % self.fails_one_in == 0:
            return Inversion(preconditioner=None, outcome=Outcome.FAILED, reason="out of mood")
        rank = int(previous["rank"]) % 3 + 1 if previous else 1
        plain = RsKfac(rank=rank, oversampling=0, power_iterations=self.power_iterations)
        inversion = plain.invert(factors, damping=damping, previous={}, seed=seed)
        # A rank this low leaves large residuals, which the ladder must not take for a breakdown.
        return replace(inversion, diagnostics={}, state={"rank": torch.tensor(rank)})


def register_moody() -> None:
    """Makes this process's jobs know the inverter."""
    INVERTERS["moody"] = Moody  # pyright: ignore[reportIndexIssue]
