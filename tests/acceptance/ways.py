"""Ways to compute the same directions of a `Problem`: by any method, or by a dense solver from the formula.

An equivalence of algorithms.md 10 says that some ways agree.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverse import AbstractPreconditioner, KroneckerSpectrum
from kfdist.curvature.inverter import AbstractInverter, Coupling, Inversion
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.inverters.ekfac import EkfacBasis
from kfdist.curvature.ladder import invert_group_with_ladder
from kfdist.curvature.references import (
    damping_shares,
    dense_kronecker,
    factors_of_rows,
    solve_dense,
    solve_factored_dense,
    weighted_fisher,
)
from kfdist.curvature.statistics import (
    KroneckerFactors,
    MeanVectors,
    Samples,
)
from kfdist.linalg.lowrank import compress_columns
from tests.acceptance.problems import Problem

Directions = dict[str, Tensor]
"""One matrix `[c, p, q]` per block; or whatever else the ways of an equivalence are compared by."""

DAMPING = 1e-2

SEED = 3

Way = Callable[[Problem], Directions]


# Ways ----------------------------------------------------------------------------------------------------------------


def by(method: str, **settings: Any) -> Way:
    """The method's direction, from its own statistic of the problem; `ekfac` measures its scales on the samples."""
    inverter = make_inverter(method, **settings)

    def way(problem: Problem) -> Directions:
        found = inverted(inverter, problem)
        return applied(inverter, found, problem.gradients, DAMPING, calibrated(found, problem))

    return way


def after(change: Callable[[Problem], Problem], way: Way) -> Way:
    """The way on the changed problem, or on another one."""
    return lambda problem: way(change(problem))


def inverted(
    inverter: AbstractInverter, problem: Problem, damping: float = DAMPING
) -> dict[str, AbstractPreconditioner]:
    """Inverts every block of a problem, one group where the method couples them; online methods folding by folding."""
    state: dict[str, Mapping[str, Tensor]] = {}
    outcomes: dict[str, Inversion] = {}
    for statistics in problem.foldings if inverter.online else [problem.statistics[inverter.statistic]]:
        for group in groups_of(inverter, statistics):
            outcomes |= invert_group_with_ladder(
                inverter,
                {name: statistics[name] for name in group},
                damping=damping,
                previous=state,
                seeds=dict.fromkeys(group, SEED),
            )
        state = {name: outcome.state for name, outcome in outcomes.items()}
    found = {}
    for name, outcome in outcomes.items():
        assert outcome.preconditioner is not None and outcome.diagnostics["rung"] == 0, outcome.reason
        found[name] = outcome.preconditioner
    return found


def applied(
    inverter: AbstractInverter,
    found: Mapping[str, AbstractPreconditioner],
    gradients: Mapping[str, Tensor],
    damping: float,
    memories: Mapping[str, dict[str, Tensor]] | None = None,
) -> Directions:
    """Applies what `inverted` found."""
    directions: Directions = {}
    for group in groups_of(inverter, found):
        members = [found[name] for name in group]
        kept = [BlockMemory(dict(memories[name]) if memories else {}) for name in group]
        solved = type(members[0]).apply_group(members, [gradients[name] for name in group], damping, kept)
        directions |= dict(zip(group, solved, strict=True))
    return directions


def groups_of(inverter: AbstractInverter, names: Mapping[str, Any]) -> list[list[str]]:
    """The groups that a method makes of blocks."""
    return [[name] for name in names] if inverter.coupling is Coupling.NONE else [list(names)]


def dense_joint(problem: Problem) -> Directions:
    """(A (x) G + lambda I)^{-1} V by a dense solver."""
    return _each(
        problem, lambda n, V: solve_dense(dense_kronecker(problem.factors[n].A, problem.factors[n].G), DAMPING, V)
    )


def dense_fisher(problem: Problem) -> Directions:
    """(F + lambda I)^{-1} V by a dense solver, F of the examples' own gradients."""
    return _each(problem, lambda name, V: solve_dense(weighted_fisher(problem.samples[name]), DAMPING, V))


def dense_factored(rule: str) -> Way:
    """(G + lambda_G I)^{-1} V (A + lambda_A I)^{-1} by a dense solver."""

    def of_block(factors: KroneckerFactors, V: Tensor) -> Tensor:
        shares = damping_shares(factors.A, factors.G, rule=rule, damping=DAMPING)
        return solve_factored_dense(factors.A, factors.G, shares, V)

    return lambda problem: _each(problem, lambda name, V: of_block(problem.factors[name], V))


def ekfac_with_eigenvalue_products(problem: Problem) -> Directions:
    """EKFAC whose scales are s = d_G d_A^T instead of measured ones."""
    basis, memories = make_inverter("ekfac"), {}
    spectra = inverted(make_inverter("kfac-eigen"), problem)
    for name, spectrum in spectra.items():
        assert isinstance(spectrum, KroneckerSpectrum)
        scales = spectrum.w_G.unsqueeze(-1) * spectrum.w_A.unsqueeze(-2)
        memories[name] = {"scales": scales, "examples": torch.ones((), dtype=torch.float64)}
    return applied(basis, inverted(basis, problem), problem.gradients, DAMPING, memories)


def calibrated(found: Mapping[str, AbstractPreconditioner], problem: Problem) -> dict[str, dict[str, Tensor]]:
    """The ranks' memories, measured on the problem's samples; empty where the method measures nothing."""
    return {
        name: each.calibration_sums(problem.samples[name]) if isinstance(each, EkfacBasis) else {}
        for name, each in found.items()
    }


def _each(problem: Problem, solve: Callable[[str, Tensor], Tensor]) -> Directions:
    return {name: solve(name, V) for name, V in problem.gradients.items()}


# Changes of a problem ------------------------------------------------------------------------------------------------


def rank_one_factors(problem: Problem) -> Problem:
    """With the outer products of the mean vectors as factors."""
    means = problem.statistics[MeanVectors]
    factors = {
        name: KroneckerFactors(
            A=each.a.unsqueeze(-1) * each.a.unsqueeze(-2), G=each.g.unsqueeze(-1) * each.g.unsqueeze(-2)
        )
        for name, each in means.items()
    }
    return replace(problem, statistics={**problem.statistics, KroneckerFactors: factors})


def expand_factors(problem: Problem) -> Problem:
    """With the factors of expand K-FAC as algorithms.md 7.9 writes them: A = Omega/T and G = T Gamma, from the rows."""
    factors = {}
    for name, each in problem.samples.items():
        summed = factors_of_rows(each)
        positions = each.positions[0]  # equal for all
        factors[name] = KroneckerFactors(A=summed.A / positions, G=summed.G * positions)
    return replace(problem, statistics={**problem.statistics, KroneckerFactors: factors})


def compressed(columns: int | None) -> Callable[[Problem], Problem]:
    """With at most so many columns an example, as the ranks send them; None for as many as there are positions."""

    def change(problem: Problem) -> Problem:
        samples = {}
        for name, each in problem.samples.items():
            a, g = compress_columns(each.a, each.g, columns or each.a.shape[2])
            samples[name] = replace(each, a=a, g=g)
        return replace(problem, statistics={**problem.statistics, Samples: samples})

    return change
