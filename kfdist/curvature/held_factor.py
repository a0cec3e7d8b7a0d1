"""One factor as the methods of the Brand family hold it between two jobs (algorithms.md 4)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from kfdist.curvature.spectra import AdaptiveRank, FactorSpectrum, probes_like
from kfdist.linalg.brand import (
    brand_update,
    draw_columns,
    light_correction,
    reorthogonalise,
    update_errors,
)
from kfdist.linalg.kronecker import Spectrum
from kfdist.linalg.psd import eigen_residual, orthogonality_residual, trace
from kfdist.seeds import split_seed

ORTHOGONALITY_LIMIT = 1e-3
"""||U^T U - I|| beyond which U is made orthonormal again (algorithms.md 4.7)."""


@dataclass(frozen=True, kw_only=True)
class HeldFactor:
    """The sum S = U diag(w) U^T of a moving average, and its weight: the factor is S / weight.

    A factor that is never updated by rows holds the last dense decomposition, has no weight and doesn't decay.

    Attributes:
        vectors: U, `[c, d, k]`, orthonormal.
        values: w, `[c, k]`, descending.
        trace: Of S, also of what was cut off, `[c]`.
        missing: Bound on ||S* - S|| in the spectral norm, `[c]`, for the whole sum S* that nothing was cut off of. It
            decays as S does, and the largest eigenvalue that an update cuts off is added to it.
        weight: Decayed count of what is in S, examples (of A) or positions (of G), a scalar; None for a factor
            without rows.
        rank: Eigenpairs r that outlive the next update.
        decomposed: Whether U and w are of a decomposition, which rows have not moved since: what is missing is then
            orthogonal to U.
    """

    vectors: Tensor
    values: Tensor
    trace: Tensor
    missing: Tensor
    weight: Tensor | None
    rank: int
    decomposed: bool = False

    @classmethod
    def empty(cls, like: Float[Tensor, "c n d"], rank: int) -> "HeldFactor":
        """Makes the factor of no examples for rows such as these; r begins at `rank`."""
        c, _, d = like.shape
        zero = like.new_zeros(c)
        return cls(
            vectors=like.new_zeros(c, d, 0),
            values=like.new_zeros(c, 0),
            trace=zero,
            missing=zero,
            weight=zero.sum(),
            rank=rank,
        )

    @classmethod
    def of_dense(
        cls, found: FactorSpectrum, matrix: Float[Tensor, "c d d"], *, weight: Float[Tensor, ""] | None, rank: int
    ) -> "HeldFactor":
        """Takes over the decomposition of a dense factor M, as S = weight M.

        No more than w_r is missing of it, as far as the decomposition is that of the r largest eigenvalues: a
        randomised one of a flat spectrum misses more (algorithms.md 3), 13 % at the defaults' power iterations.
        """
        scale = torch.ones((), dtype=matrix.dtype, device=matrix.device) if weight is None else weight
        values = found.spectrum.values * scale
        return cls(
            vectors=found.spectrum.vectors,
            values=values,
            trace=trace(matrix) * scale,
            missing=torch.zeros_like(values[..., 0]) if found.spectrum.complete else values[..., -1].clone(),
            weight=weight,
            rank=rank,
            decomposed=True,
        )

    @classmethod
    def from_state(
        cls, state: Mapping[str, Tensor], label: str, like: Float[Tensor, "..."], *, rank: int | None
    ) -> "HeldFactor | None":
        """Reads what `to_state` wrote; None if there is nothing.

        Older checkpoints don't say what is missing: it is no more than the larger one of S* and S is.

        Args:
            state: Of the last version.
            label: The factor's letter.
            like: A tensor of the dtype and device to compute in.
            rank: r from now on; None for what it was.
        """
        if f"U_{label}" not in state:
            return None
        weight = state.get(f"weight_{label}")
        values, whole = state[f"w_{label}"].to(like), state[f"trace_{label}"].to(like)
        missing = state.get(f"missing_{label}")
        return cls(
            vectors=state[f"U_{label}"].to(like),
            values=values,
            trace=whole,
            missing=_at_most(values, whole) if missing is None else missing.to(like),
            weight=None if weight is None else weight.to(like),
            rank=int(state[f"rank_{label}"]) if rank is None else rank,
            decomposed=weight is None,
        )

    def to_state(self, label: str) -> dict[str, Tensor]:
        """Writes it down as tensors; a factor without rows has no weight there either."""
        state = {
            f"U_{label}": self.vectors,  # shared with what is applied: nothing writes into it
            f"w_{label}": self.values.clone(),
            f"trace_{label}": self.trace.clone(),
            f"missing_{label}": self.missing.clone(),
            f"rank_{label}": torch.tensor(self.rank, dtype=torch.int64, device="cpu"),
        }
        if self.weight is not None:
            state[f"weight_{label}"] = self.weight.clone()
        return state

    @property
    def measured(self) -> bool:
        """Whether any example is in it; waits for the tensor."""
        return self.weight is None or float(self.weight) > 0.0

    def decayed(self, decay: Float[Tensor, ""], counted: Float[Tensor, ""]) -> "HeldFactor":
        """Returns it with S <- decay S, and the weight as if the new rows were in S already."""
        assert self.weight is not None
        weight = decay * self.weight + counted
        return replace(
            self,
            values=decay * self.values,
            trace=decay * self.trace,
            missing=decay * self.missing,
            weight=weight,
        )

    def updated(self, rows: Float[Tensor, "c n d"], *, seed: int, label: str) -> tuple["HeldFactor", dict[str, float]]:
        """Adds rows^T rows to S by Brand's update.

        U is made orthonormal first where it no longer is, and what is beyond the rank is cut off.

        Args:
            rows: Those that only fill the buffer, all zero, are left out: they would add null columns.
            seed: The inversion's.
            label: The factor's letter.

        Returns:
            The factor with up to n columns more than its rank, and diagnostics.
        """
        leading = self.vectors[..., : self.rank]  # what is cut off here needs no check
        repair = leading.shape[-1] > 0 and _orthogonality(leading, seed, label) > ORTHOGONALITY_LIMIT
        before = reorthogonalise(self.vectors, self.values) if repair else (self.vectors, self.values)
        missing = self.missing + self._largest_beyond(before[1])
        before = before[0][..., : self.rank], before[1][..., : self.rank]
        sizes = torch.linalg.vector_norm(rows, dim=-1)
        filled = sizes.amax(0) > 0
        filled[0] = True  # an update of nothing is one too
        if not bool(filled.all()):
            rows = rows[:, filled]
        vectors, values = brand_update(*before, rows)
        probes = probes_like(vectors, seed=seed, label=label)
        residual, orthogonality = update_errors(before, rows, (vectors, values), probes)
        after = replace(
            self,
            vectors=vectors,
            values=values,
            trace=self.trace + sizes.square().sum(-1),
            missing=missing,
            decomposed=False,
        )
        return after, {
            f"residual_{label}": float(residual.max()),
            f"orthogonality_{label}": float(orthogonality.max()) * vectors.shape[-1] ** 0.5,
            f"repairs_{label}": float(repair),
        }

    def truncated(self) -> "HeldFactor":
        """Returns it with its leading r eigenpairs."""
        return replace(
            self,
            vectors=self.vectors[..., : self.rank],
            values=self.values[..., : self.rank],
            missing=self.missing + self._largest_beyond(self.values),
        )

    def _largest_beyond(self, values: Float[Tensor, "c k"]) -> Float[Tensor, " c"]:
        """Returns the largest eigenvalue that isn't of the leading r; 0 where there are no others."""
        return values[..., self.rank] if values.shape[-1] > self.rank else torch.zeros_like(self.missing)

    def corrected(self, matrix: Float[Tensor, "c d d"], *, fraction: float, seed: int, label: str) -> "HeldFactor":
        """Refreshes m = round(fraction k + 1) random ones of its k eigenpairs from the dense factor M = S / weight.

        Those of eigenvalue zero don't count: rows that only fill up, or repeat each other, leave vectors there that are
        made of rounding, and so would the result be.

        With C = S* - S and the projection P onto those, C - P C P takes the place of C: of [[a, b], [b^T, d]], a
        becomes 0, which makes the norm at most 2 / sqrt(3) as large, for b^2 + d^2 <= ||C||^2 on every vector.
        """
        assert self.weight is not None
        floor = self.values[..., :1] * self.vectors.shape[-2] * torch.finfo(self.values.dtype).eps
        k = max(1, int((self.values > floor).sum(-1).max()))
        m = min(round(fraction * k + 1), k)
        columns = draw_columns(k, m, seed=split_seed(seed, f"correction/{label}"), device=matrix.device)
        vectors, values = light_correction(self.vectors, self.values / self.weight, matrix, columns)
        values = values * self.weight
        missing = torch.minimum(2 / 3**0.5 * self.missing, _at_most(values, self.trace))
        return replace(self, vectors=vectors, values=values, missing=missing)

    def adapted(self, rule: AdaptiveRank, *, most: int) -> "HeldFactor":
        """Returns it with the rank for the next update; unchanged while it has fewer eigenpairs than its rank.

        Args:
            rule: How e = w_min/w_max of the kept eigenvalues moves the rank.
            most: Largest rank that leaves room for the rows.
        """
        if self.values.shape[-1] < self.rank:
            return self
        return replace(self, rank=rule.following(self.values[..., : self.rank], most, rank=self.rank))

    def spectrum(self, *, continued: bool) -> Spectrum:
        """Returns the eigenpairs of S / weight; other eigenvalues are 0 or, if `continued`, the smallest kept one."""
        values = self.values if self.weight is None else self.values / self.weight
        found = Spectrum(self.vectors, values, torch.zeros_like(values[..., 0]))
        return found._replace(tail=values[..., -1].clone()) if continued and not found.complete else found

    def mean_trace(self) -> Float[Tensor, " c"]:
        """Returns the trace of the factor, also of what was cut off."""
        return self.trace if self.weight is None else self.trace / self.weight

    def mean_missing(self) -> Float[Tensor, " c"] | None:
        """Returns what may be missing of the factor; None where that is orthogonal to U and no larger than w_r."""
        if self.decomposed or self.weight is None:
            return None
        return self.missing / self.weight

    def diagnostics(self, label: str, found: Mapping[str, float], *, seed: int) -> dict[str, float]:
        """Returns its diagnostics with those of how it came about; waits for the tensors.

        Args:
            label: The factor's letter.
            found: Of the update or the decomposition; what these don't say of U^T U, probes do.
            seed: The inversion's.
        """
        spectrum, orthogonality = self.spectrum(continued=False), f"orthogonality_{label}"
        return {
            f"rank_{label}": float(spectrum.values.shape[-1]),
            f"smallest_eigenvalue_{label}": float(spectrum.values.min()),
            orthogonality: found[orthogonality]
            if orthogonality in found
            else _orthogonality(self.vectors, seed, label),
            **found,
        }

    def approximation_error(self, matrix: Float[Tensor, "c d d"], *, seed: int, label: str) -> dict[str, float]:
        """Estimates how far it is from the dense factor, relative to that."""
        spectrum = self.spectrum(continued=False)
        probes = probes_like(matrix, seed=seed, label=label)
        error = eigen_residual(matrix, spectrum.values, spectrum.vectors, probes)
        return {f"approximation_error_{label}": float(error.max())}


def _at_most(values: Float[Tensor, "c k"], whole: Float[Tensor, " c"]) -> Float[Tensor, " c"]:
    """Returns what ||S* - S|| can't exceed, whatever was cut off: neither S* nor S has negative eigenvalues."""
    return torch.maximum(values[..., 0], whole) if values.shape[-1] else whole.clone()


def _orthogonality(vectors: Float[Tensor, "c d k"], seed: int, label: str) -> float:
    """Estimates the groups' largest ||U^T U - I||, Frobenius, by probes: at a cost linear in k, not quadratic."""
    probes = probes_like(vectors.mT, seed=seed, label=f"orthogonality/{label}")
    return float(orthogonality_residual(vectors, probes).max()) * vectors.shape[-1] ** 0.5
