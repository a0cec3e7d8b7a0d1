"""The sides of the equivalences of algorithms.md 10: directions of real layers, by any method or by a dense solver.

A `Scene` holds what a model's layers contribute to the curvature over some batches, in float64, as capture measures it
and the moving average folds it. A `Side` turns a scene into directions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kfdist.capture.hooks import Capture
from kfdist.capture.requests import CHAIN_SUMS, COARSE_SUMS, PLAIN_SUMS
from kfdist.curvature.averages import WeightedSums, decay_at
from kfdist.curvature.inverse import AbstractPreconditioner, BlockMemory, KroneckerSpectrum
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
    ChainFactors,
    CoarseFactors,
    Increment,
    KroneckerFactors,
    MeanVectors,
    Samples,
)
from kfdist.linalg.lowrank import compress_columns
from tests.support.factors import armed_capture, blocks_of

Batch = tuple[Tensor, Tensor]

Directions = dict[str, Tensor]
"""One matrix `[c, p, q]` per block; or whatever else the two sides of an equivalence are compared by."""

DAMPING = 1e-2

SEED = 3

DECAY = 0.9

ALL = 10**6
"""More examples, or a larger rank, than anything here has."""


@dataclass(frozen=True)
class Scene:
    """What some batches say of a model's blocks, in the model's order.

    Attributes:
        foldings: Per batch and block, what the online methods get: the rows of this folding and the dense average.
        statistics: By kind of record and block, what the others get: sums averaged over all batches, samples of the
            last one.
        gradients: V of the last batch, by block.
    """

    foldings: Sequence[Mapping[str, Increment]]
    statistics: Mapping[type, Mapping[str, Any]]
    gradients: Mapping[str, Tensor]

    @property
    def factors(self) -> Mapping[str, KroneckerFactors]:
        return self.statistics[KroneckerFactors]

    @property
    def samples(self) -> Mapping[str, Samples]:
        return self.statistics[Samples]


Side = Callable[[Scene], Directions]


def measure(model: nn.Module, batches: Sequence[Batch], *, coupled: bool = False) -> Scene:
    """Measures the blocks of a model over some batches of cross entropy.

    Args:
        model: In float64.
        batches: One per folding.
        coupled: Measure also what methods that couple blocks want; the layers must be a chain of Linear ones.
    """
    blocks = blocks_of(model)
    groups = [list(blocks)] if coupled else []
    capture = armed_capture(
        model,
        chains=groups,
        coarse=groups,
        sums=PLAIN_SUMS | (CHAIN_SUMS | COARSE_SUMS if coupled else frozenset()),
        rows=frozenset({"A", "G"}),
        samples=ALL,
    )
    averages: dict[str, WeightedSums] = {}
    foldings, samples = [], {}
    for k, batch in enumerate(batches):
        increments, samples = _fold(capture, model, batch, averages, decay_at(k + 1, DECAY))
        foldings.append(increments)
    return Scene(foldings, _records(averages, samples, coupled), {name: b.gradient() for name, b in blocks.items()})


def _fold(
    capture: Capture, model: nn.Module, batch: Batch, averages: dict[str, WeightedSums], rho: float
) -> tuple[dict[str, Increment], dict[str, Samples]]:
    """Folds one batch into the averages; returns its increments and its samples."""
    model.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    increments, samples, drained = {}, {}, capture.drain()
    for name in blocks_of(model):  # what is drained comes in the order of the backward pass
        each = drained[name]
        shapes = {part: tuple(total.shape) for part, total in each.sums.items()}
        average = averages.setdefault(name, WeightedSums.zeros(shapes, dtype=torch.float64, device=torch.device("cpu")))
        average.fold(each, rho)
        increments[name] = Increment(
            A_rows=(1 - rho) ** 0.5 * each.rows["A"],
            G_rows=(1 - rho) ** 0.5 * each.rows["G"],
            examples=torch.tensor((1 - rho) * each.examples, dtype=torch.float64),
            decay=torch.tensor(rho, dtype=torch.float64),
            A=average.sums["A"] / average.weight,
            G=average.sums["G"] / average.weight,
        )
        assert each.samples is not None
        a, g, weight = each.samples.a, each.samples.g, each.samples.weight.double()
        source = torch.zeros(len(weight), dtype=torch.int64)
        samples[name] = Samples(a=a, g=g, weight=weight, source=source, positions=torch.tensor(float(a.shape[2])))
    return increments, samples


def _records(
    averages: Mapping[str, WeightedSums], samples: Mapping[str, Samples], coupled: bool
) -> dict[type, Mapping[str, Any]]:
    means = {name: {part: s / each.weight for part, s in each.sums.items()} for name, each in averages.items()}
    wanted: dict[type, tuple[str, ...]] = {KroneckerFactors: ("A", "G"), MeanVectors: ("a", "g")}
    if coupled:
        wanted[ChainFactors] = ("A", "G", "A_next", "G_next")
        wanted[CoarseFactors] = ("A", "G", "a_cross", "g_cross")
    records: dict[type, Mapping[str, Any]] = {
        kind: {name: kind(**{part: each[part] for part in parts}) for name, each in means.items()}
        for kind, parts in wanted.items()
    }
    return {**records, Samples: samples}


# Sides ---------------------------------------------------------------------------------------------------------------


def by(method: str, **settings: Any) -> Side:
    """The method's direction, from its own statistic of the scene; `ekfac` measures its scales on the samples."""
    inverter = make_inverter(method, **settings)

    def side(scene: Scene) -> Directions:
        found = inverted(inverter, scene)
        return applied(inverter, found, scene.gradients, DAMPING, calibrated(found, scene))

    return side


def on(change: Callable[[Scene], Scene], side: Side) -> Side:
    """A side on a changed scene, or on another one."""
    return lambda scene: side(change(scene))


def inverted(inverter: AbstractInverter, scene: Scene, damping: float = DAMPING) -> dict[str, AbstractPreconditioner]:
    """Inverts every block of a scene, one group where the method couples them; online methods folding by folding."""
    state: dict[str, Mapping[str, Tensor]] = {}
    outcomes: dict[str, Inversion] = {}
    for statistics in scene.foldings if inverter.online else [scene.statistics[inverter.statistic]]:
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


def dense_joint(scene: Scene) -> Directions:
    """(A (x) G + lambda I)^{-1} V by a dense solver."""
    return _each(scene, lambda n, V: solve_dense(dense_kronecker(scene.factors[n].A, scene.factors[n].G), DAMPING, V))


def dense_fisher(scene: Scene) -> Directions:
    """(F + lambda I)^{-1} V by a dense solver, F of the examples' own gradients."""
    return _each(scene, lambda name, V: solve_dense(weighted_fisher(scene.samples[name]), DAMPING, V))


def dense_factored(rule: str) -> Side:
    """(G + lambda_G I)^{-1} V (A + lambda_A I)^{-1} by a dense solver."""

    def of_block(factors: KroneckerFactors, V: Tensor) -> Tensor:
        shares = damping_shares(factors.A, factors.G, rule=rule, damping=DAMPING)
        return solve_factored_dense(factors.A, factors.G, shares, V)

    return lambda scene: _each(scene, lambda name, V: of_block(scene.factors[name], V))


def ekfac_with_eigenvalue_products(scene: Scene) -> Directions:
    """EKFAC whose scales are s = d_G d_A^T instead of measured ones."""
    basis, memories = make_inverter("ekfac"), {}
    spectra = inverted(make_inverter("kfac-eigen"), scene)
    for name, spectrum in spectra.items():
        assert isinstance(spectrum, KroneckerSpectrum)
        scales = spectrum.w_G.unsqueeze(-1) * spectrum.w_A.unsqueeze(-2)
        memories[name] = {"scales": scales, "examples": torch.ones((), dtype=torch.float64)}
    return applied(basis, inverted(basis, scene), scene.gradients, DAMPING, memories)


def calibrated(found: Mapping[str, AbstractPreconditioner], scene: Scene) -> dict[str, dict[str, Tensor]]:
    """The ranks' memories, measured on the scene's samples; empty where the method measures nothing."""
    return {
        name: each.calibration_sums(scene.samples[name]) if isinstance(each, EkfacBasis) else {}
        for name, each in found.items()
    }


def _each(scene: Scene, solve: Callable[[str, Tensor], Tensor]) -> Directions:
    return {name: solve(name, V) for name, V in scene.gradients.items()}


# Changes of a scene --------------------------------------------------------------------------------------------------


def rank_one_factors(scene: Scene) -> Scene:
    """With the outer products of the mean vectors as factors."""
    means = scene.statistics[MeanVectors]
    factors = {
        name: KroneckerFactors(
            A=each.a.unsqueeze(-1) * each.a.unsqueeze(-2), G=each.g.unsqueeze(-1) * each.g.unsqueeze(-2)
        )
        for name, each in means.items()
    }
    return replace(scene, statistics={**scene.statistics, KroneckerFactors: factors})


def expand_factors(scene: Scene) -> Scene:
    """With the factors of expand K-FAC as algorithms.md 7.9 writes them: A = Omega/T and G = T Gamma, from the rows."""
    factors = {}
    for name, each in scene.samples.items():
        summed = factors_of_rows(each)
        factors[name] = KroneckerFactors(A=summed.A / each.positions, G=summed.G * each.positions)
    return replace(scene, statistics={**scene.statistics, KroneckerFactors: factors})


def compressed(columns: int | None) -> Callable[[Scene], Scene]:
    """With at most so many columns an example, as the ranks send them; None for as many as there are positions."""

    def change(scene: Scene) -> Scene:
        samples = {}
        for name, each in scene.samples.items():
            a, g = compress_columns(each.a, each.g, columns or each.a.shape[2])
            samples[name] = replace(each, a=a, g=g)
        return replace(scene, statistics={**scene.statistics, Samples: samples})

    return change
