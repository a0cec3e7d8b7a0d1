r"""The moving average of a block's statistics, as weighted sums that add up over ranks.

A rank keeps (S, w) per block and folds each due batch by

    S <- rho S + (1 - rho) sum_n x_n,    w <- rho w + (1 - rho) n,

where x_n are example n's contributions. Summing S and w over the ranks and dividing gives the weighted mean of all
finite
examples: ranks may have batches of different length, or none, and nothing has to be reduced until an inversion is due.
rho_k = min(1 - 1/k, decay) for the k-th folding (Martens & Grosse 2015, section 5), so the first overwrites and early
estimates are plain averages; w is its own normaliser, so no bias correction is needed elsewhere.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kfdist.curvature.records import PackedRecord
from kfdist.linalg.psd import pack_triangle


def decay_at(update: int, decay: float) -> float:
    """Returns rho_k = min(1 - 1/k, decay) for the `update`-th folding, k = 1, 2, ..."""
    return min(1.0 - 1.0 / update, decay)


@dataclass
class BatchStatistics:
    """What one step's batch says about a block, summed over examples: the x and n of the module docstring.

    Attributes:
        A: Sum over examples of Omega's terms, [c, q, q].
        G: Sum over examples of Gamma's terms, [c, p, p].
        examples: How many examples are in the sums.
    """

    A: Tensor
    G: Tensor
    examples: float


class WeightedSums:
    """The local (S, w) of one block; plain tensors on the model's device.

    Attributes:
        A: Weighted sum of Omega's terms, [c, q, q].
        G: Weighted sum of Gamma's terms, [c, p, p].
        weight: w, a scalar tensor.
        dropped: How many batches were dropped as non-finite, a scalar tensor (read it late: reading syncs a device).
    """

    def __init__(self, A: Tensor, G: Tensor, weight: Tensor, dropped: Tensor | None = None) -> None:
        self.A, self.G, self.weight = A, G, weight
        self.dropped = torch.zeros((), device=weight.device) if dropped is None else dropped

    @classmethod
    def zeros(cls, c: int, p: int, q: int, *, dtype: torch.dtype, device: torch.device) -> "WeightedSums":
        """Makes the sums of no batches."""
        return cls(
            torch.zeros(c, q, q, dtype=dtype, device=device),
            torch.zeros(c, p, p, dtype=dtype, device=device),
            torch.zeros((), dtype=dtype, device=device),
        )

    def fold(self, batch: BatchStatistics | None, rho: float, step_is_finite: Tensor | None = None) -> None:
        """Folds one due batch in, without a host sync.

        Args:
            batch: This rank's batch; None if it had none. A non-finite one adds zero, like none, and is counted.
            rho: The decay of this folding, the same on all ranks.
            step_is_finite: Boolean scalar; where it is false the whole step is skipped and nothing changes.
        """
        kept = torch.full_like(self.weight, rho)
        gain = torch.full_like(self.weight, 1.0 - rho)
        if step_is_finite is not None:
            kept = torch.where(step_is_finite, kept, torch.ones_like(kept))
            gain = torch.where(step_is_finite, gain, torch.zeros_like(gain))
        self.A.mul_(kept)
        self.G.mul_(kept)
        self.weight.mul_(kept)
        if batch is None:
            return
        # A sum is non-finite if any entry is: one reduction per factor instead of a mask.
        finite = torch.isfinite(batch.A.sum() + batch.G.sum())
        zero = torch.zeros((), dtype=self.A.dtype, device=self.A.device)
        self.A.add_(torch.where(finite, batch.A, zero) * gain)
        self.G.add_(torch.where(finite, batch.G, zero) * gain)
        self.weight.add_(torch.where(finite, gain * batch.examples, zero))
        self.dropped.add_((~finite).to(self.dropped.dtype))

    def packed(self) -> list[Tensor]:
        """Returns what travels in a reduction: the packed triangles of A and G, and w."""
        return [pack_triangle(self.A), pack_triangle(self.G), self.weight.reshape(1)]


def packed_factors(A: Tensor, G: Tensor, weight: Tensor) -> PackedRecord:
    """Turns reduced sums into Omega = sum S_A / sum w and Gamma = sum S_G / sum w, packed as they are.

    Args:
        A: Packed triangles of the summed S_A, [c, q(q+1)/2].
        G: Packed triangles of the summed S_G, [c, p(p+1)/2].
        weight: The summed w, [1], positive.

    Returns:
        A packed `KroneckerFactors`, ready for a job's payload: the rank never builds the square matrices.
    """
    return PackedRecord(kind="kronecker-factors", tensors={"A": A / weight, "G": G / weight}, static={})
