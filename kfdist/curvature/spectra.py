"""Decompositions of one factor with their diagnostics, shared by the methods that damp at apply."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kfdist.curvature.inverse import KroneckerSpectrum
from kfdist.curvature.inverter import Inversion, Outcome
from kfdist.curvature.kept_pairs import Missing, keep_enough
from kfdist.curvature.statistics import KroneckerFactors
from kfdist.errors import ConfigError
from kfdist.linalg.kronecker import DampingRule, Spectrum
from kfdist.linalg.lowrank import gaussian_sketch, numerical_rank, randomized_eigh, randomized_svd, range_basis
from kfdist.linalg.psd import eigen_residual, eigh_descending, orthogonality_residual, trace
from kfdist.seeds import split_seed

Decomposition = Literal["rsvd", "srevd"]
"""The randomised decompositions: by singular values (more accurate) or by projected eigenvalues (cheaper)."""

EIGH_FLOPS = 9.0
"""Operations of a symmetric eigendecomposition over d^3: 4/3 to tridiagonalise, the rest for the eigenvectors."""

FULL_BELOW = 3
"""Widths of a sketch up to which a factor is decomposed in full on a CPU: that is exact and takes less time (a core:
24 ms in place of 63 at d = 512, 75 in place of 93 at 768, for sketches 230 wide)."""

MOSTLY = 0.5
"""Share of a factor's rows beyond which it isn't copied to leave out those that are zero."""

PROBES = 4
"""Random columns by which residuals are estimated: enough to miss a gross error with probability below 1e-6, at a
cost of O(d^2)."""

_MOST_DIMENSIONS = 320
"""Dimensions up to which a factor's range is found whole; with more, a sketch that is iterated takes less time."""

_WHOLE = 400
"""Relative error, in units of rounding, up to which a range was found whole: products leave 25 to 45."""

NEGATIVE_TOLERANCE = 1e-3
"""Negative eigenvalues up to this fraction of the largest are rounding: sums of d float32 products reach about d
1e-7."""


class AdaptiveRank(NamedTuple):
    """A rank that follows the spectrum, by e = w_min/w_max of the kept eigenvalues (algorithms.md 4.4).

    Attributes:
        grow_above: e above which the next rank is larger: something that matters was cut off.
        shrink_below: e below which it is smaller.
        grow: By how much it grows.
        shrink: By how much it shrinks.
        least: Smallest rank, where the factor is that large.
        most: Largest rank.
    """

    grow_above: float
    shrink_below: float
    grow: int
    shrink: int
    least: int
    most: int

    def check(self, rank: int) -> None:
        """Refuses a rank to begin with that is out of its bounds.

        Raises:
            ConfigError: It is.
        """
        if not self.least <= rank <= self.most:
            allowed = f"from {self.least} to {self.most}"
            raise ConfigError(f"{rank} is not allowed with adaptive_rank; must be {allowed}", path="rank")

    def following(self, values: Float[Tensor, "c r"], d: int, *, rank: int) -> int:
        """Returns the rank of the next decomposition; waits for the values.

        Args:
            values: Kept eigenvalues, descending, not negative; the group that falls off least decides. Where a factor
                has fewer than `rank` that aren't zero, fewer may be given.
            d: Size of the factor, which clamps the rank.
            rank: The rank that was asked for.
        """
        rank = min(rank, d)
        if values.shape[-1] < rank:
            e = 0.0
        else:
            largest = values[..., 0]
            e = float(torch.where(largest > 0, values[..., -1] / largest, torch.zeros_like(largest)).max())
        if e > self.grow_above:
            rank += self.grow
        elif e < self.shrink_below:
            rank -= self.shrink
        return min(max(rank, self.least), self.most, d)


@dataclass(frozen=True, kw_only=True)
class FactorSpectrum:
    """The decomposition of one factor.

    Attributes:
        spectrum: Clamped eigenvalues, eigenvectors, and a tail of zero.
        outcome: DONE or CLAMPED.
        diagnostics: By name with the factor's letter.
    """

    spectrum: Spectrum
    outcome: Outcome
    diagnostics: dict[str, float]


def is_narrow(d: int, sketch: int, device: torch.device | str = "cpu") -> bool:
    """Says whether a d x d factor is decomposed in full and not by a sketch so wide.

    On a CPU up to `FULL_BELOW` widths. An accelerator's products are far faster than its eigendecompositions: there,
    only where the sketch would be as wide as the factor. Estimates, which don't know the device, count a CPU's.
    """
    return d <= (FULL_BELOW if torch.device(device).type == "cpu" else 1) * sketch


def full_spectrum(matrix: Float[Tensor, "c d d"], *, rank: int, seed: int, label: str) -> FactorSpectrum:
    """Decomposes a factor by a full eigendecomposition and keeps the leading `rank` pairs.

    Args:
        matrix: Symmetric.
        rank: Pairs to keep, at most d.
        seed: The inversion's seed, for the probes of the diagnostics.
        label: The factor's letter.
    """
    values, vectors = eigh_descending(matrix)
    probes = probes_like(matrix, seed=seed, label=label)
    residual, orthogonality = eigen_residual(matrix, values, vectors, probes), orthogonality_residual(vectors, probes)
    found = _factor_spectrum(values, vectors, rank, residual, orthogonality, label)
    if rank < matrix.shape[-1]:
        whole = torch.linalg.vector_norm(values, dim=-1)
        error = torch.linalg.vector_norm(values[..., rank:], dim=-1) / torch.where(whole > 0, whole, 1)
        found.diagnostics[f"approximation_error_{label}"] = error.max().item()
    return found


def randomized_spectrum(
    matrix: Float[Tensor, "c d d"],
    *,
    rank: int,
    oversampling: int,
    power_iterations: int,
    method: Decomposition,
    seed: int,
    label: str,
    start: Float[Tensor, "c d k"] | None = None,
) -> FactorSpectrum:
    """Decomposes a factor by the randomised methods of algorithms.md 3.2.

    Where a full eigendecomposition costs no more, it is that (`is_narrow`). What never differed from zero (patches of
    small images, pixels of a border) has neither rows nor columns: they are left out, exactly. A factor of few
    examples, as at the first step, has as few dimensions: they are found whole, by two narrow products.

    Args:
        matrix: Symmetric.
        rank: Pairs to keep; clamped to d.
        oversampling: Further columns of the sketch.
        power_iterations: Further multiplications by the matrix.
        method: "rsvd" or "srevd".
        seed: The inversion's seed.
        label: The factor's letter.
        start: Directions near the eigenvectors, in any precision; at most `rank` of them, the first ones,
            take the place of random columns. The others stay random, so that what is new can be found.
    """
    d = matrix.shape[-1]
    rank = min(rank, d)
    if is_narrow(d, rank + oversampling, matrix.device):
        return full_spectrum(matrix, rank=rank, seed=seed, label=label)
    used = (matrix.diagonal(dim1=-2, dim2=-1) != 0).any(0)  # of a second moment the rest of the row is zero, too
    if 0 < int(used.sum()) <= MOSTLY * d:
        places = used.nonzero().squeeze(-1)
        found = randomized_spectrum(
            matrix[:, places.unsqueeze(-1), places],
            rank=rank,
            oversampling=oversampling,
            power_iterations=power_iterations,
            method=method,
            seed=seed,
            label=label,
            start=None if start is None else start[:, places],
        )
        return replace(found, spectrum=_spread_out(found.spectrum, used, rank))

    few = _of_few_dimensions(matrix, used, rank=rank, oversampling=oversampling, seed=seed, label=label)
    if few is not None:
        return few

    def sketch() -> Tensor:
        columns = gaussian_sketch(matrix, rank + oversampling, seed=split_seed(seed, f"sketch/{label}"))
        if start is not None:
            known = start[..., :rank]
            columns[..., : known.shape[-1]] = known
        return columns

    decompose = randomized_svd if method == "rsvd" else randomized_eigh
    # Handed on without a name, so that each goes as soon as the next one is there.
    values, vectors = decompose(*range_basis(matrix, sketch(), power_iterations=power_iterations))
    orthogonality = orthogonality_residual(vectors, probes_like(vectors.mT, seed=seed, label=label))
    # The whole sketch is looked at before it is cut: a large negative eigenvalue may hide behind `rank` positive ones.
    found = _factor_spectrum(values, vectors, rank, torch.zeros_like(orthogonality), orthogonality, label)
    probes = probes_like(matrix, seed=seed, label=label)
    neglected = eigen_residual(matrix, found.spectrum.values, found.spectrum.vectors, probes)
    found.diagnostics[f"approximation_error_{label}"] = neglected.max().item()
    return found


def _of_few_dimensions(
    matrix: Float[Tensor, "c d d"], used: Bool[Tensor, " d"], *, rank: int, oversampling: int, seed: int, label: str
) -> FactorSpectrum | None:
    """Returns all that there is of a factor whose range has few dimensions, perhaps less than `rank`; else None."""
    dimensions = numerical_rank(matrix, used.nonzero().squeeze(-1), most=min(matrix.shape[-1] // 4, _MOST_DIMENSIONS))
    if dimensions is None:
        return None
    sketch = gaussian_sketch(matrix, dimensions + oversampling, seed=split_seed(seed, f"sketch/{label}"))
    values, vectors = randomized_eigh(*range_basis(matrix, sketch, power_iterations=0))
    probes = probes_like(matrix, seed=seed, label=label)
    residual = eigen_residual(matrix, values, vectors, probes)
    if not bool((residual <= _WHOLE * torch.finfo(matrix.dtype).eps).all()):
        return None
    orthogonality = orthogonality_residual(vectors, probes_like(vectors.mT, seed=seed, label=label))
    found = _factor_spectrum(values, vectors, min(rank, vectors.shape[-1]), residual, orthogonality, label)
    if rank < vectors.shape[-1]:
        residual = eigen_residual(matrix, found.spectrum.values, found.spectrum.vectors, probes)
    found.diagnostics[f"approximation_error_{label}"] = residual.max().item()
    return found


def _spread_out(spectrum: Spectrum, used: Bool[Tensor, " d"], rank: int) -> Spectrum:
    """Returns the leading `rank` pairs of a factor from those of its rows and columns that aren't zero.

    Where those have fewer, pairs of eigenvalue 0 follow, whose vectors are axes of what is left out.
    """
    values, vectors = spectrum.values, spectrum.vectors
    known = values.shape[-1]
    whole = vectors.new_zeros(len(vectors), len(used), rank)
    whole[:, used, :known] = vectors
    axes = (~used).nonzero().squeeze(-1)[: rank - known]
    whole[:, axes, torch.arange(known, rank, device=whole.device)] = 1.0
    return Spectrum(whole, torch.cat([values, values.new_zeros(len(values), rank - known)], -1), spectrum.tail)


def full_spectra(factors: KroneckerFactors, seed: int) -> tuple[FactorSpectrum, FactorSpectrum]:
    """Decomposes A and G by full eigendecompositions and keeps all pairs."""
    A = full_spectrum(factors.A, rank=factors.A.shape[-1], seed=seed, label="A")
    return A, full_spectrum(factors.G, rank=factors.G.shape[-1], seed=seed, label="G")


def spectral_inversion(
    factors: KroneckerFactors,
    A: FactorSpectrum,
    G: FactorSpectrum,
    *,
    damping_rule: DampingRule,
) -> Inversion:
    """Makes the preconditioner from both decompositions, with what they tell."""
    trace_A, trace_G = trace(factors.A), trace(factors.G)
    return Inversion(
        preconditioner=KroneckerSpectrum.of(
            A.spectrum, G.spectrum, trace_A=trace_A, trace_G=trace_G, damping_rule=damping_rule
        ),
        outcome=Outcome.worst(A.outcome, G.outcome),
        diagnostics=A.diagnostics | G.diagnostics,
    )


def enough_of(
    A: Spectrum,
    G: Spectrum,
    *,
    traces: tuple[Float[Tensor, " c"], Float[Tensor, " c"]],
    damping_rule: DampingRule,
    damping: float,
    direction_error: float | None,
    missing: Missing = (None, None),
) -> tuple[KroneckerSpectrum, dict[str, float]]:
    """Makes the preconditioner of as many eigenpairs as its directions need; see `kept_pairs.keep_enough`.

    Returns:
        The preconditioner, and what was kept: `rank_*`, the bound that holds, `direction_error`, the mean behind it,
        `mean_direction_error`, and `limited_by_rank`, 1 where that bound is above what was asked for, else 0.
    """
    kept = keep_enough(
        A,
        G,
        traces=traces,
        damping_rule=damping_rule,
        damping=damping,
        direction_error=direction_error or 0.0,
        missing=missing,
    )
    preconditioner = KroneckerSpectrum.of(
        kept.A,
        kept.G,
        trace_A=traces[0],
        trace_G=traces[1],
        damping_rule=damping_rule,
        least_damping=kept.least_damping,
    )
    ranks = {f"rank_{label}": float(each.values.shape[-1]) for label, each in (("A", kept.A), ("G", kept.G))}
    limited = direction_error is not None and 0 < direction_error < kept.error
    errors = {"direction_error": kept.error, "mean_direction_error": kept.mean_error}
    return preconditioner, {**ranks, **errors, "limited_by_rank": float(limited)}


def probes_like(matrix: Float[Tensor, "c d k"], *, seed: int, label: str) -> Float[Tensor, "c d 4"]:
    """Draws Gaussian probe columns for a matrix; dtype, device and rows are its own.

    Args:
        matrix: The matrix that is probed, or one with as many rows.
        seed: The inversion's seed.
        label: Which factor.
    """
    return gaussian_sketch(matrix, PROBES, seed=split_seed(seed, f"probes/{label}"))


def _factor_spectrum(
    values: Tensor, vectors: Tensor, rank: int, residual: Tensor, orthogonality: Tensor, label: str
) -> FactorSpectrum:
    """Clamps and cuts what was found.

    A basis that isn't orthogonal is as wrong as one that isn't of eigenvectors, so `residual_*`, by which the ladder
    judges, is the larger of both errors. `orthogonality_*` is ||U^T U - I||, Frobenius, which the probes estimate.
    """
    diagnostics = {
        f"residual_{label}": torch.maximum(residual, orthogonality).max().item(),
        f"orthogonality_{label}": orthogonality.max().item() * vectors.shape[-1] ** 0.5,
        f"smallest_eigenvalue_{label}": values.min().item(),
        f"rank_{label}": float(rank),
    }
    largest = values.abs().amax(-1, keepdim=True)
    beyond_rounding = bool((values < -NEGATIVE_TOLERANCE * largest).any())
    clamped = values.clamp_min(0)
    order = clamped.argsort(dim=-1, descending=True, stable=True)[..., :rank]
    kept = clamped.gather(-1, order)
    columns = vectors.gather(-1, order.unsqueeze(-2).expand(*vectors.shape[:-1], rank))
    spectrum = Spectrum(columns, kept, torch.zeros_like(kept[..., 0]))
    outcome = Outcome.CLAMPED if beyond_rounding else Outcome.DONE
    return FactorSpectrum(spectrum=spectrum, outcome=outcome, diagnostics=diagnostics)
