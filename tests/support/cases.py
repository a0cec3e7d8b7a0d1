"""What each inversion method claims: one row per method and setting. The contract suite runs over all of them.

A new method adds its rows here and gets the whole suite.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kfdist.curvature.inverters import AbstractInverter, Outcome, make_inverter
from kfdist.curvature.references import (
    damping_shares,
    dense_kronecker,
    leading_part,
    project_to_psd,
    solve_dense,
    solve_factored_dense,
)
from kfdist.curvature.statistics import KroneckerFactors
from tests.support.matrices import BAD, GOOD
from tests.support.samples import pairs_of

Reference = Callable[[KroneckerFactors, float, Tensor], Tensor]

DAMPING = 1e-2

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-3}
"""Relative error against the dense solve. At `DAMPING` the condition number of the problem is at most about 1e3 (joint
damping, eigenvalues up to 4), so rounding makes 1e3 times 1e-16 or 6e-8, times a modest factor for the sizes."""


def unchanged(factors: KroneckerFactors) -> KroneckerFactors:
    """Returns the factors: the statistic of most methods."""
    return factors


@dataclass(frozen=True, kw_only=True)
class InverterCase:
    """One row.

    Attributes:
        name: Key of `INVERTERS`.
        reference: The direction it must produce, in dense float64.
        settings: Of the inverter.
        spectra: For which it claims to equal the reference; a truncated method can't where the spectrum has no gap.
        indefinite: What it must say of a factor with a small but real negative eigenvalue; a truncated method doesn't
        see it.
        damping_is_lambda: False where `damping` isn't the lambda of F + lambda I (the published relative rule).
        statistics: Makes the method's own statistic of two factors, such that it stands for the same block.
        bad: Which spoiled factors its statistic can express; rows, for one, can't be asymmetric.
    """

    name: str
    reference: Reference
    settings: Mapping[str, Any] = field(default_factory=dict)
    spectra: tuple[str, ...] = tuple(GOOD)
    indefinite: Outcome = Outcome.CLAMPED
    damping_is_lambda: bool = True
    statistics: Callable[[KroneckerFactors], Any] = unchanged
    bad: tuple[str, ...] = tuple(BAD)

    @property
    def id(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.settings.items())])

    def make(self) -> AbstractInverter:
        return make_inverter(self.name, **self.settings)


def factored(rule: str, *, rank: int = 10**6, continued: bool = False) -> Reference:
    """Each factor truncated to its leading part, then damped by `rule` from its full self."""

    def reference(factors: KroneckerFactors, damping: float, gradient: Tensor) -> Tensor:
        A, G = project_to_psd(factors.A), project_to_psd(factors.G)
        shares = damping_shares(A, G, rule=rule, damping=damping)
        A, G = leading_part(A, rank, continued=continued), leading_part(G, rank, continued=continued)
        return solve_factored_dense(A, G, shares, gradient)

    return reference


def joint(*, rank: int = 10**6, continued: bool = False) -> Reference:
    """The product of the truncated factors, plus lambda I."""

    def reference(factors: KroneckerFactors, damping: float, gradient: Tensor) -> Tensor:
        A = leading_part(project_to_psd(factors.A), rank, continued=continued)
        G = leading_part(project_to_psd(factors.G), rank, continued=continued)
        return solve_dense(dense_kronecker(A, G), damping, gradient)

    return reference


SHORT = {"rank": 3, "oversampling": 2, "power_iterations": 14}
"""A real truncation of both generated factors; the error of the basis is about (w_6 / w_3)^15, below the tolerance."""

WITH_GAP = ("decaying", "huge-condition", "one-sample", "zero")
"""Spectra that fall fast enough after the third eigenvalue for a sketch of five columns to find the first three."""

CASES = [
    InverterCase(name="kfac", reference=factored("pi"), indefinite=Outcome.MORE_DAMPING),
    InverterCase(
        name="kfac",
        settings={"damping_rule": "relative"},
        reference=factored("relative"),
        indefinite=Outcome.MORE_DAMPING,
        damping_is_lambda=False,
    ),
    InverterCase(name="kfac-eigen", reference=joint()),
    InverterCase(name="kfac-eigen", settings={"damping_rule": "pi"}, reference=factored("pi")),
    InverterCase(
        name="kfac-eigen",
        settings={"damping_rule": "relative"},
        reference=factored("relative"),
        damping_is_lambda=False,
    ),
    InverterCase(name="rs-kfac", reference=factored("pi")),
    InverterCase(name="rs-kfac", settings={"damping_rule": "common"}, reference=joint()),
    InverterCase(
        name="rs-kfac",
        settings=SHORT,
        reference=factored("pi", rank=3),
        spectra=WITH_GAP,
        indefinite=Outcome.DONE,
    ),
    InverterCase(name="rs-kfac", settings={"adaptive_rank": True, "warm_start": True}, reference=factored("pi")),
    InverterCase(name="sre-kfac", reference=factored("pi")),
    InverterCase(
        name="sre-kfac",
        settings={**SHORT, "damping_rule": "relative"},
        reference=factored("relative", rank=3),
        spectra=WITH_GAP,
        indefinite=Outcome.DONE,
        damping_is_lambda=False,
    ),
    InverterCase(
        name="sre-kfac",
        settings={**SHORT, "rank": 200, "rank_schedule": [[0, 3], [50, 4]], "warm_start": True},
        reference=factored("pi", rank=3),
        spectra=WITH_GAP,
        indefinite=Outcome.DONE,
    ),
    InverterCase(
        name="rs-kfac",
        settings={**SHORT, "damping_rule": "common", "spectrum_continuation": True},
        reference=joint(rank=3, continued=True),
        spectra=WITH_GAP,
        indefinite=Outcome.DONE,
    ),
    InverterCase(name="seng", reference=joint(), statistics=pairs_of, bad=()),
    InverterCase(name="seng", settings={"form": "implicit"}, reference=joint(), statistics=pairs_of, bad=()),
    InverterCase(
        name="seng",
        settings={"form": "implicit", "column_sample_size": 12},
        reference=joint(),
        statistics=pairs_of,
        bad=(),
    ),
    InverterCase(name="seng", settings={"aggregate": "local-average"}, reference=joint(), statistics=pairs_of, bad=()),
]
