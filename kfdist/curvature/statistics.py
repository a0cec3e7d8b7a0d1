"""What is measured of a block, and how it is scaled.

Notation: N examples, T positions per example (1 for a layer without weight sharing), rows a of layer inputs `[N T, q]`
with the homogeneous coordinate last, rows g of output gradients `[N T, p]` of the *per-example* loss. Then

    A = Omega = (1/N) sum over examples and positions of a a^T       (sum over positions)
    G = Gamma = (1/(N T)) sum over examples and positions of g g^T   (mean over positions)

and the block of the Fisher matrix is A (x) G (Grosse & Martens, arXiv 1602.01407; algorithms.md 2.1). Everything has a
leading dimension c, the groups of a convolution, 1 for other layers.
"""

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from kfdist.curvature.records import symmetric_field


class Statistic(StrEnum):
    """What an inverter needs of a block."""

    FACTORS = "factors"
    """A and G, averaged over batches and ranks."""
    SAMPLES = "samples"
    """Rows a and g themselves."""


@dataclass(frozen=True)
class FactorSums:
    """Plain sums over the rows of one call of a layer, in float32 at least.

    Where positions were sub-sampled, the sums are scaled to estimate those over all rows without bias, and `rows`
    counts all rows: nobody downstream has to know.

    Attributes:
        A: Sum of a a^T, `[c, q, q]`.
        G: Sum of g g^T for g exactly as autograd gave it, `[c, p, p]`.
        rows: Examples times positions.
    """

    A: Tensor
    G: Tensor
    rows: int


@dataclass(frozen=True)
class KroneckerFactors:
    """The two factors of a block, scaled as this module's docstring says.

    Attributes:
        A: Omega, `[c, q, q]`.
        G: Gamma, `[c, p, p]`.
    """

    A: Tensor = symmetric_field()
    G: Tensor = symmetric_field()


STATISTICS: dict[str, type] = {"kronecker-factors": KroneckerFactors}
"""Records that may stand in a job, by name."""
