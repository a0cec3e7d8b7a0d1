"""What is measured of a block, and how it is scaled.

Notation: N examples (or the terms that `batch` states), N T positions of all of them together (T is 1 for a layer
without weight sharing; where examples differ in length, or some positions are masked out, T is their mean), rows a of
layer inputs `[N T, q]` with the homogeneous coordinate last, rows g of output gradients `[N T, p]` of the *per-example*
loss. Then

    A = Omega = (1/N) sum over examples and positions of a a^T       (sum over positions)
    G = Gamma = (1/(N T)) sum over examples and positions of g g^T   (mean over positions)

and the block of the Fisher matrix is A (x) G (Grosse & Martens, arXiv 1602.01407; algorithms.md 2.1). Everything has a
leading dimension c, the groups of a convolution, 1 for other layers.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from kfdist.wire.records import symmetric_field


@dataclass(frozen=True)
class FactorSums:
    """Plain sums over the rows of one call of a layer, in float32 at least; those not asked for have no elements.

    Where positions were sub-sampled, the sums are scaled to estimate those over all rows without bias, and `rows`
    counts all rows, so that later steps need not know.

    Attributes:
        A: Sum of a a^T, `[c, q, q]`; `[c, 0, 0]` if not asked for.
        G: Sum of g g^T for g exactly as autograd gave it, `[c, p, p]`; `[c, 0, 0]` if not asked for.
        a: Sum of the rows a, homogeneous coordinate last, `[c, q]`; `[c, 0]` if not asked for.
        g: Sum of the rows g, `[c, p]`; `[c, 0]` if not asked for.
        rows: Examples times positions; of those that count, an estimate where positions were sub-sampled.
        A_diagonal: The diagonal of A, `[c, q]`, of tables alone.
    """

    A: Tensor
    G: Tensor
    a: Tensor
    g: Tensor
    rows: int | Tensor
    A_diagonal: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class KroneckerFactors:
    """The two factors of a block, scaled as this module's docstring says.

    Attributes:
        A: Omega, `[c, q, q]`.
        G: Gamma, `[c, p, p]`.
    """

    A: Tensor = symmetric_field()
    G: Tensor = symmetric_field()


@dataclass(frozen=True, kw_only=True)
class DiagonalFactors:
    """The two factors of a table, scaled alike.

    Attributes:
        A_diagonal: The diagonal of Omega, how often an example uses each row of the table, `[c, q]`.
        G: Gamma, `[c, p, p]`.
    """

    A_diagonal: Tensor
    G: Tensor = symmetric_field()


@dataclass(frozen=True, kw_only=True)
class ChainFactors(KroneckerFactors):
    """Factors of a layer in a chain, and its cross factors with the layer after it (algorithms.md 1.3).

    Attributes:
        A_next: (1/N) sum over examples of a_i a_{i+1}^T, inputs of this layer and of the next, `[1, q_i, q_{i+1}]`;
            `[1, q, 0]` for the last layer.
        G_next: (1/N) sum over examples of g_i g_{i+1}^T, `[1, p_i, p_{i+1}]`; `[1, p, 0]` for the last layer.
    """

    A_next: Tensor
    G_next: Tensor


@dataclass(frozen=True, kw_only=True)
class CoarseFactors(KroneckerFactors):
    """Factors of a block, and its sums with every block of its group (algorithms.md 7.1).

    Attributes:
        a_cross: Row i of sum(A_ij), the sum of all entries of E[a_i a_j^T], `[L]` for L blocks in the group's order;
            scaled like Omega (sum over positions).
        g_cross: Row i of sum(G_ij), likewise, scaled like Gamma (mean over the pairs of positions).
    """

    a_cross: Tensor
    g_cross: Tensor


@dataclass(frozen=True, kw_only=True)
class MeanVectors:
    """Mean rows of a block, scaled so that a a^T and g g^T are the rank-one parts of Omega and Gamma.

    Attributes:
        a: sqrt(T) times the mean over examples and positions of the rows a, `[c, q]`.
        g: The mean over examples and positions of the rows g, `[c, p]`.
    """

    a: Tensor
    g: Tensor


@dataclass(frozen=True, kw_only=True)
class UnitFisher:
    """The Fisher matrix of each unit of a block, not a product of factors.

    Attributes:
        F: (1/N) sum over examples of v v^T, v the unit's gradient of the per-example loss, `[c, k, k]`.
    """

    F: Tensor


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Rows of single examples: example i's gradient of the block is sum_t g_it a_it^T.

    With N = sum_i weight_i terms_i, the block of the empirical Fisher is (1/N) sum_i weight_i vec(.) vec(.)^T; Omega
    and Gamma are (1/N) sum_i weight_i sum_t a a^T and sum_i weight_i sum_t g g^T / sum_i weight_i positions_i.

    Attributes:
        a: `[c, n, T', q]`, homogeneous coordinate last.
        g: `[c, n, T', p]`, of the loss as N terms are averaged: N times the gradient of its mean.
        weight: How many examples each one stands for, `[n]`; 0 for rows that only fill up.
        terms: How many terms of the loss's mean each one has, `[n]`: 1, but where `batch` states another number.
        source: Rank that measured each example, int64 `[n]`.
        positions: T of each example, `[n]`. Rows may be fewer (compressed columns) or filled up with zeros.
    """

    a: Tensor
    g: Tensor
    weight: Tensor
    terms: Tensor
    source: Tensor
    positions: Tensor

    @property
    def examples(self) -> Float[Tensor, ""]:
        """N, a scalar."""
        return (self.weight * self.terms).sum()


@dataclass(frozen=True, kw_only=True)
class Increment:
    """One folding of a moving average by rows, and dense factors where they are due (algorithms.md 4).

    The sums S <- decay S + rows^T rows and counts w <- decay w + examples (of A) or positions (of G) are those of
    `kfdist.curvature.averages`: the folding's gain 1 - rho is in the rows and in both counts already.

    Attributes:
        A_rows: `[c, s, q]` with rows^T rows = this folding's addition to S_A; `[c, 0, q]` where A has no rows.
        G_rows: `[c, s, p]`, likewise.
        examples: This folding's addition to w of A, a scalar.
        positions: Its addition to w of G, a scalar.
        decay: rho of this folding, a scalar.
        A: Dense Omega of the moving average, `[c, q, q]`; `[c, 0, 0]` where it isn't due or never held.
        G: Dense Gamma, `[c, p, p]`, likewise.
    """

    A_rows: Tensor
    G_rows: Tensor
    examples: Tensor
    positions: Tensor
    decay: Tensor
    A: Tensor = symmetric_field()
    G: Tensor = symmetric_field()


@dataclass(frozen=True, kw_only=True)
class GradientMoments:
    """Weighted sums over steps of the second moments of a gradient, seen as c tensors `[d_1, ..., d_k]`, k up to 4.

    Those of a mode are over all other dimensions: with X_i the tensor unfolded to `[d_i, rest]`, X_i X_i^T; some
    methods weigh the rest. Nothing is divided: methods need the sums as well as the means.

    Attributes:
        mode_1: `[c, d_1, d_1]`; `[c, 0, 0]` for the modes after the k-th, likewise.
        mode_2: The second mode's.
        mode_3: The third's.
        mode_4: The fourth's.
        weight: The sum of the steps' weights, `[1]`: with a decay rho, 1 - rho^t after t steps; without, t.
    """

    mode_1: Tensor = symmetric_field()
    mode_2: Tensor = symmetric_field()
    mode_3: Tensor = symmetric_field()
    mode_4: Tensor = symmetric_field()
    weight: Tensor

    @property
    def sums(self) -> list[Float[Tensor, "c d d"]]:
        """Those of the modes there are."""
        return [each for each in (self.mode_1, self.mode_2, self.mode_3, self.mode_4) if each.shape[-1]]


MODES = ("mode_1", "mode_2", "mode_3", "mode_4")
"""The fields of `GradientMoments` that are moments."""


@dataclass(frozen=True, kw_only=True)
class SampleBudget:
    """How many examples' rows a method wants, for the whole job over all ranks.

    Attributes:
        examples: Most examples, shared evenly among the ranks and drawn by (seed, step).
        rows: Most rows after expansion over positions; None: no further limit.
        columns: Keep kappa columns an example where it has more positions, by a truncated SVD of its gradient's
            factors: sum_t g a^T stays (nearly) the same; None keeps all positions.
        pooled: Whether the rows are wanted as the factors see them, one an example where weights are shared by
            "reduce"; otherwise as the gradient has them.
    """

    examples: int
    rows: int | None = None
    columns: int | None = None
    pooled: bool = False


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What an inverter wants measured of one block.

    Attributes:
        sums: Fields of its statistic that are averaged over batches and ranks.
        increments: Factors ("A", "G") that it wants as rows of each folding.
        increment_rows: Most rows of one increment over all ranks; beyond it they are sketched.
        applied_rows: Whether its inverse is multiplied onto the rows of every step instead of onto the gradient.
        samples: Examples' rows of the step at which the block is inverted.
        calibration: Examples' rows for `AbstractPreconditioner.calibration_sums`.
    """

    sums: frozenset[str] = frozenset({"A", "G"})
    increments: frozenset[str] = frozenset()
    increment_rows: int = 0
    applied_rows: bool = False
    samples: SampleBudget | None = None
    calibration: SampleBudget | None = None


STATISTICS: dict[str, type] = {
    "kronecker-factors": KroneckerFactors,
    "diagonal-factors": DiagonalFactors,
    "chain-factors": ChainFactors,
    "coarse-factors": CoarseFactors,
    "mean-vectors": MeanVectors,
    "unit-fisher": UnitFisher,
    "samples": Samples,
    "increment": Increment,
    "gradient-moments": GradientMoments,
}
"""Records that may stand in a job, by name."""
