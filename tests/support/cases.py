"""What each inversion method claims: one row per method and setting. The contract suite runs over all of them.

A new method adds its rows here and gets the whole suite.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kfdist.curvature.inverter import AbstractInverter, Outcome
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.references import (
    damping_shares,
    dense_kronecker,
    leading_part,
    project_to_psd,
    solve_dense,
    solve_factored_dense,
)
from kfdist.curvature.statistics import KroneckerFactors
from tests.support.coupled import chain_of_one, group_of_one
from tests.support.increments import dense_alone, rows_alone, rows_and_dense
from tests.support.matrices import BAD, GOOD
from tests.support.samples import leading_rows, pairs_of, rows_of

KINDS = ("residual", "smallest_eigenvalue", "rank")

BY_INVERSE = frozenset(f"{kind}_{label}" for kind in KINDS for label in "AG")
"""Diagnostics of a method that keeps no eigenvectors."""

BY_EIGENPAIRS = BY_INVERSE | {"orthogonality_A", "orthogonality_G"}

BY_GRAM = frozenset(f"{kind}_gram" for kind in (*KINDS, "orthogonality"))

NO_DIAGNOSTICS = frozenset[str]()
"""Of methods that the ranks run themselves: reading a number would make the host wait at every inversion."""

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
        stands_for: The factors that its statistic stands for, where it can't express all of them.
        bad: Which spoiled factors its statistic can express; rows, for one, can't be asymmetric.
        diagnostics: Which numbers its inversions carry, whatever the spectrum, beside the ladder's own.
    """

    name: str
    reference: Reference
    settings: Mapping[str, Any] = field(default_factory=dict)
    spectra: tuple[str, ...] = tuple(GOOD)
    indefinite: Outcome = Outcome.CLAMPED
    damping_is_lambda: bool = True
    statistics: Callable[[KroneckerFactors], Any] = unchanged
    stands_for: Callable[[KroneckerFactors], KroneckerFactors] = unchanged
    bad: tuple[str, ...] = tuple(BAD)
    diagnostics: frozenset[str] = BY_EIGENPAIRS

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


def scaled(factors: KroneckerFactors, damping: float, gradient: Tensor) -> Tensor:
    """The gradient over lambda plus the mean eigenvalue of the product."""
    mean_A, mean_G = (m.double().diagonal(dim1=1, dim2=2).mean(1) for m in (factors.A, factors.G))
    return gradient.double() / (damping + mean_A * mean_G)[:, None, None]


def outer(factors: KroneckerFactors) -> KroneckerFactors:
    """The rank-one parts of the factors."""
    return KroneckerFactors(
        A=leading_part(factors.A, 1, continued=False), G=leading_part(factors.G, 1, continued=False)
    )


SHORT = {"rank": 1, "oversampling": 1, "power_iterations": 14}
"""A real truncation of both generated factors, so narrow that they aren't decomposed in full; the error of the basis is
about (w_3 / w_1)^29, below the tolerance."""

WITH_GAP = ("decaying", "huge-condition", "one-sample", "zero")
"""Spectra that fall fast enough after the first eigenvalue for a sketch of two columns to find it."""

CONVERGED = {"tolerance": 1e-13, "max_iterations": 200}
"""Only then is the solution of conjugate gradients linear in the gradient."""

NOT_FINITE = ("nan", "inf")
"""What rows can be; their second moment is always one."""

CASES = [
    InverterCase(name="kfac", reference=factored("pi"), indefinite=Outcome.MORE_DAMPING, diagnostics=BY_INVERSE),
    InverterCase(
        name="kfac",
        settings={"damping_rule": "relative"},
        reference=factored("relative"),
        indefinite=Outcome.MORE_DAMPING,
        damping_is_lambda=False,
        diagnostics=BY_INVERSE,
    ),
    InverterCase(name="kfac-eigen", reference=joint()),
    InverterCase(name="kfac-eigen", settings={"damping_rule": "pi"}, reference=factored("pi")),
    InverterCase(
        name="kfac-eigen",
        settings={"damping_rule": "relative"},
        reference=factored("relative"),
        damping_is_lambda=False,
    ),
    InverterCase(
        name="kfac-tridiagonal",
        reference=factored("pi"),
        statistics=chain_of_one,
        indefinite=Outcome.MORE_DAMPING,
        diagnostics=BY_EIGENPAIRS | {"largest_correlation_A", "largest_correlation_G"},
    ),
    InverterCase(
        name="two-level",
        reference=joint(),
        statistics=group_of_one,
        diagnostics=BY_EIGENPAIRS | {"smallest_eigenvalue_coarse"},
    ),
    InverterCase(
        name="two-level",
        settings={"inner": "rs-kfac", "inner_settings": SHORT},
        reference=factored("pi", rank=1),
        spectra=WITH_GAP,
        statistics=group_of_one,
        indefinite=Outcome.DONE,
        diagnostics=BY_EIGENPAIRS | {"smallest_eigenvalue_coarse"},
    ),
    InverterCase(name="rs-kfac", reference=factored("pi")),
    InverterCase(name="rs-kfac", settings={"damping_rule": "common"}, reference=joint()),
    InverterCase(
        name="rs-kfac",
        settings=SHORT,
        reference=factored("pi", rank=1),
        spectra=WITH_GAP,
        indefinite=Outcome.DONE,
    ),
    InverterCase(name="rs-kfac", settings={"adaptive_rank": True, "warm_start": True}, reference=factored("pi")),
    InverterCase(name="sre-kfac", reference=factored("pi")),
    InverterCase(
        name="sre-kfac",
        settings={**SHORT, "damping_rule": "relative"},
        reference=factored("relative", rank=1),
        spectra=WITH_GAP,
        indefinite=Outcome.DONE,
        damping_is_lambda=False,
    ),
    InverterCase(
        name="sre-kfac",
        settings={**SHORT, "rank": 200, "rank_schedule": [[0, 1], [50, 2]], "warm_start": True},
        reference=factored("pi", rank=1),
        spectra=WITH_GAP,
        indefinite=Outcome.DONE,
    ),
    InverterCase(
        name="rs-kfac",
        settings={**SHORT, "damping_rule": "common", "spectrum_continuation": True},
        reference=joint(rank=1, continued=True),
        spectra=WITH_GAP,
        indefinite=Outcome.DONE,
    ),
    InverterCase(name="b-kfac", reference=factored("pi"), statistics=rows_alone, bad=NOT_FINITE),
    InverterCase(
        name="b-kfac",
        settings={"rank": 3, "truncate": "after", "damping_rule": "relative"},
        reference=factored("relative", rank=3),
        statistics=rows_alone,
        bad=NOT_FINITE,
        damping_is_lambda=False,
    ),
    InverterCase(
        name="b-kfac",
        settings={"rank": 3, "truncate": "after", "damping_rule": "common", "spectrum_continuation": True},
        reference=joint(rank=3, continued=True),
        statistics=rows_alone,
        bad=NOT_FINITE,
    ),
    # A block of which no factor is large enough for Brand's update.
    InverterCase(name="b-kfac", settings={"damping_rule": "common"}, reference=joint(), statistics=dense_alone),
    InverterCase(name="b-r-kfac", reference=factored("pi"), statistics=rows_and_dense),
    InverterCase(name="b-kfac-c", reference=factored("pi"), statistics=rows_and_dense, indefinite=Outcome.DONE),
    InverterCase(
        name="b-kfac-c",
        settings={"rank": 3, "truncate": "after", "correction_fraction": 1.0},
        reference=factored("pi", rank=3),
        # Eigenvalues of 1e24 beside a damping of 1e-2 are beyond the dense solver.
        spectra=tuple(spectrum for spectrum in GOOD if spectrum != "large"),
        statistics=rows_and_dense,
        indefinite=Outcome.DONE,
    ),
    *(
        InverterCase(
            name="seng",
            settings=settings,
            reference=joint(),
            statistics=pairs_of,
            bad=NOT_FINITE,
            diagnostics=BY_GRAM,
        )
        for settings in (
            {},
            {"form": "implicit"},
            {"form": "implicit", "column_sample_size": 12},
            {"aggregate": "local-average"},
        )
    ),
    # What the ranks measure is tested in tests/unit/curvature/inverters/test_ekfac.py; before that, it scales.
    InverterCase(name="ekfac", reference=scaled),
    # The same of what it learns, in test_ekfac_adam.py.
    InverterCase(name="ekfac-adam", reference=scaled),
    InverterCase(name="ekfac-adam", settings={"rank": 2}, reference=scaled),
    InverterCase(
        name="cg-fac",
        settings=CONVERGED,
        reference=joint(),
        statistics=rows_of,
        bad=NOT_FINITE,
        diagnostics=NO_DIAGNOSTICS,
    ),
    InverterCase(
        name="cg-fac",
        settings={**CONVERGED, "operator": "block", "jacobi": True},
        reference=joint(),
        statistics=pairs_of,
        bad=NOT_FINITE,
        diagnostics=NO_DIAGNOSTICS,
    ),
    InverterCase(
        name="eva",
        reference=joint(rank=1),
        # One eigenvalue of 1e24 beside lambda is beyond what the dense solve resolves.
        spectra=tuple(spectrum for spectrum in GOOD if spectrum != "large"),
        statistics=leading_rows,
        stands_for=outer,
        bad=NOT_FINITE,
        diagnostics=NO_DIAGNOSTICS,
    ),
]
