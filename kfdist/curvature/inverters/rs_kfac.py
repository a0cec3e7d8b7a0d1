"""RS-KFAC and SRE-KFAC: K-FAC with randomised low-rank factors (Puiu, arXiv 2206.15397; algorithms.md 3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from typing_extensions import override

from kfdist import checks
from kfdist.curvature.inverse import AbstractPreconditioner, KroneckerSpectrum, prepared_numbers
from kfdist.curvature.inverter import AbstractInverter, Estimate, Inversion, Operation, Outcome, Work
from kfdist.curvature.spectra import (
    EIGH_FLOPS,
    MOSTLY,
    AdaptiveRank,
    Decomposition,
    FactorSpectrum,
    enough_of,
    is_narrow,
    randomized_spectrum,
)
from kfdist.curvature.statistics import KroneckerFactors
from kfdist.errors import ConfigError
from kfdist.linalg.kronecker import DampingRule
from kfdist.linalg.lowrank import PAIRED
from kfdist.linalg.psd import trace
from kfdist.types import BlockShape

RankSchedule = tuple[tuple[int, int], ...]
"""Pairs (inversion, rank): from that inversion of the block on, counted from 0, the rank applies."""

PUBLISHED_RULE = AdaptiveRank(grow_above=0.053, shrink_below=0.026, grow=10, shrink=10, least=10, most=700)
"""The adaptive rank of the published runs (algorithms.md 4.4)."""

RANKS = (512, 256, 128, 64, 32)
"""Ranks that "auto" tries low-rank methods with."""

_SKETCHES = 7
"""Tensors of a sketch's size that a decomposition has at once (tests/unit/curvature/test_peaks.py)."""

_SVD_FLOPS = 22.0
"""Operations of the singular value decomposition of a square matrix, over s^3."""


@dataclass(frozen=True, kw_only=True)
class AbstractSketchedKfac(AbstractInverter):
    """Keeps the leading eigenpairs of each factor, found with a Gaussian sketch; applies their inverse in O(r p q).

    The sketch has s = r + l columns; a factor of size 3 s or less is decomposed in full, which is exact and faster.

    Attributes:
        rank: Eigenpairs r kept of each factor, clamped to its size.
        oversampling: Further columns l of the sketch.
        power_iterations: Further multiplications of the sketch by the factor, orthogonalised after each; from 4 on, two
            of them are saved without loss.
        spectrum_continuation: Take the eigenvalues that aren't kept as equal to the smallest kept one.
        damping_rule: "pi" (factored Tikhonov), "relative" (the published rule lambda_A = phi w_max(A); damping is then
            phi) or "common" (exact on products of eigenvalues).
        rank_schedule: Pairs (inversion, rank) in rising order: from that inversion of the block on, counted from 0, the
            rank is that one; before the first pair it is `rank`.
        adaptive_rank: Let each factor's rank follow its spectrum: 10 more where w_min/w_max of the kept eigenvalues is
            above 0.053, 10 fewer where it is below 0.026, from 10 to 700 (algorithms.md 4.4). It begins at `rank`.
        warm_start: Begin the sketch with the eigenvectors of the version before; they travel with each job.
        direction_error: Cut off the eigenpairs that the directions don't need: each component of a direction stays
            within this share of what all eigenpairs would give (`kept_pairs`). 0 or None keeps `rank` pairs.
    """

    produces: ClassVar[type[AbstractPreconditioner]] = KroneckerSpectrum
    decomposition: ClassVar[Decomposition]

    rank: int = 220
    oversampling: int = 10
    power_iterations: int = 4
    spectrum_continuation: bool = False
    damping_rule: DampingRule = "pi"
    rank_schedule: RankSchedule = ()
    adaptive_rank: bool = False
    warm_start: bool = False
    direction_error: float | None = 0.05

    def __post_init__(self) -> None:
        checks.count("rank", self.rank, least=1)
        if self.direction_error is not None:
            checks.number("direction_error", self.direction_error, least=0, below=1, hint="0 keeps all pairs")
        checks.count("oversampling", self.oversampling, least=0)
        checks.count("power_iterations", self.power_iterations, least=0)
        checks.choice("damping_rule", self.damping_rule, ("pi", "relative", "common"))
        for switch in ("spectrum_continuation", "adaptive_rank", "warm_start"):
            checks.switch(switch, getattr(self, switch))
        object.__setattr__(self, "rank_schedule", _checked_schedule(self.rank_schedule))
        if self.adaptive_rank:
            self._check_adaptive()

    @override
    def invert(
        self, statistics: KroneckerFactors, *, damping: float, previous: Mapping[str, Tensor], seed: int
    ) -> Inversion:
        inversion = int(previous["inversions"]) if "inversions" in previous else 0
        found = {
            label: self._decompose(matrix, label, inversion, previous, seed)
            for label, matrix in (("A", statistics.A), ("G", statistics.G))
        }
        A, G = found["A"], found["G"]
        preconditioner, kept = enough_of(
            A.spectrum,
            G.spectrum,
            traces=(trace(statistics.A), trace(statistics.G)),
            damping_rule=self.damping_rule,
            damping=damping,
            direction_error=self.direction_error,
        )
        return Inversion(
            preconditioner=preconditioner,
            outcome=Outcome.worst(A.outcome, G.outcome),
            diagnostics=A.diagnostics | G.diagnostics | kept,
            state=self._state(found, inversion, previous),
        )

    @override
    def estimate(self, shape: BlockShape) -> Estimate:
        """Counts both decompositions, and the eigenvectors once more where they travel as the next job's start."""
        sizes = shape.d_in, shape.d_out
        copies = 2 if self.warm_start else 1
        pairs = [(d, min(self._largest_rank, d)) for d in sizes]
        numbers = sum(d * r for d, r in pairs)
        prepared = prepared_numbers(*pairs, damping_rule=self.damping_rule)
        work = [self.factor_work(d) for d in sizes]
        return Estimate(work, copies * numbers, prepared, max(map(self.workspace, sizes)))

    def workspace(self, d: int) -> int:
        """Counts what a d x d factor's decomposition has at once: its sketches, and a copy where many rows are zero.

        Nothing for a factor that a CPU decomposes in full; an accelerator has a few sketches of it.
        """
        s = min(self._largest_rank, d) + self.oversampling
        return 0 if is_narrow(d, s) else _SKETCHES * s * d + round((MOSTLY * d) ** 2)

    def factor_work(self, d: int) -> Work:
        """Counts the operations for one d x d factor, at the largest rank of the schedule.

        q + 2 products of d x d with d x s and as many orthogonalisations; two products fewer where two bases are
        joined (`range_basis`); or a full decomposition, where that is a CPU's way (`is_narrow`).
        """
        s = min(self._largest_rank, d) + self.oversampling
        if is_narrow(d, s):
            return Work(Operation.EIGH, EIGH_FLOPS * d**3)
        q = self.power_iterations
        if q >= PAIRED and 2 * s <= d:
            flops = q * 2.0 * d * d * s + (3 * q + 20) * 1.0 * d * s * s + EIGH_FLOPS * (2 * s) ** 3
        else:
            flops = (q + 2) * 2.0 * d * d * s + (q + 1) * 3.0 * d * s * s
        if self.decomposition == "rsvd":
            flops += 7.0 * d * s * s + _SVD_FLOPS * s**3
        else:
            flops += 4.0 * d * s * s + EIGH_FLOPS * s**3
        return Work(Operation.SKETCH, flops)

    @classmethod
    @override
    def candidates(cls, shape: BlockShape) -> Sequence[Self]:
        return [cls(rank=rank) for rank in candidate_ranks(shape)]

    @property
    def _largest_rank(self) -> int:
        return max([self.rank, *(rank for _, rank in self.rank_schedule)])

    def _decompose(
        self, matrix: Tensor, label: str, inversion: int, previous: Mapping[str, Tensor], seed: int
    ) -> FactorSpectrum:
        found = randomized_spectrum(
            matrix,
            rank=self._rank_of(label, inversion, previous),
            oversampling=self.oversampling,
            power_iterations=self.power_iterations,
            method=self.decomposition,
            seed=seed,
            label=label,
            start=previous.get(f"U_{label}") if self.warm_start else None,
        )
        if self.spectrum_continuation and not found.spectrum.complete:
            found = replace(found, spectrum=found.spectrum._replace(tail=found.spectrum.values[..., -1].clone()))
        return found

    def _rank_of(self, label: str, inversion: int, previous: Mapping[str, Tensor]) -> int:
        """Returns r of one factor; the sketch's width follows it, since it is computed from it every time."""
        if self.adaptive_rank and f"rank_{label}" in previous:
            return int(previous[f"rank_{label}"])
        return next((rank for start, rank in reversed(self.rank_schedule) if inversion >= start), self.rank)

    def _state(
        self, found: Mapping[str, FactorSpectrum], inversion: int, previous: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        if self.rank_schedule:
            state["inversions"] = torch.tensor(inversion + 1, dtype=torch.int64, device="cpu")
        for label, factor in found.items():
            if self.adaptive_rank:
                d = factor.spectrum.vectors.shape[-2]
                asked = self._rank_of(label, inversion, previous)
                following = PUBLISHED_RULE.following(factor.spectrum.values, d, rank=asked)
                state[f"rank_{label}"] = torch.tensor(following, dtype=torch.int64, device="cpu")
            if self.warm_start:
                state[f"U_{label}"] = factor.spectrum.vectors.clone()
        return state

    def _check_adaptive(self) -> None:
        if self.rank_schedule:
            raise ConfigError("true excludes a rank_schedule: give one of them", path="adaptive_rank")
        PUBLISHED_RULE.check(self.rank)


@dataclass(frozen=True, kw_only=True)
class RsKfac(AbstractSketchedKfac):
    """The randomised singular value decomposition: M ~ V diag(w) V^T from the right singular vectors V of Q^T M.

    V carries one more multiplication by M than the sketch does, so it is more accurate than `sre-kfac`.
    """

    name: ClassVar[str] = "rs-kfac"
    decomposition: ClassVar[Decomposition] = "rsvd"


@dataclass(frozen=True, kw_only=True)
class SreKfac(AbstractSketchedKfac):
    """The projected eigendecomposition: Q^T M Q = Z diag(w) Z^T, U = Q Z (algorithms.md 3.2).

    Cheaper than `rs-kfac`, and less accurate, because the projection is from both sides.
    """

    name: ClassVar[str] = "sre-kfac"
    decomposition: ClassVar[Decomposition] = "srevd"


def candidate_ranks(shape: BlockShape) -> Sequence[int]:
    """Returns those of `RANKS` up to a quarter of the larger factor: above, a full decomposition would be cheaper."""
    return [rank for rank in RANKS if 4 * rank <= max(shape.d_in, shape.d_out)] or [RANKS[-1]]


def _checked_schedule(value: Any) -> RankSchedule:
    """Returns a rank schedule as tuples; JSON and TOML bring lists."""
    given = [list(pair) if isinstance(pair, list | tuple) else pair for pair in _listed(value)]
    for pair in given:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ConfigError(f"{pair!r} is not allowed; write pairs [inversion, rank]", path="rank_schedule")
        checks.count("rank_schedule", pair[0], least=0)
        checks.count("rank_schedule", pair[1], least=1)
    starts = [pair[0] for pair in given]
    if starts != sorted(set(starts)):
        raise ConfigError(f"the inversions {starts} are not allowed; they must rise", path="rank_schedule")
    return tuple((start, rank) for start, rank in given)


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{value!r} is not allowed; write a list of pairs [inversion, rank]", path="rank_schedule")
    return list(value)
