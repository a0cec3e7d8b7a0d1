"""A block whose exact inverse is known, whatever the size of its large factor."""

from typing import Any

import torch
from torch import Tensor

from kfdist.curvature.inverse import KroneckerSpectrum
from kfdist.curvature.statistics import Increment, KroneckerFactors, MeanVectors, Samples
from kfdist.linalg.kronecker import Spectrum

SMALL, EXAMPLES = 16, 256
DAMPING = 1e-3
FOLDINGS, DECAY = 4, 0.95


class Problem:
    """A block's statistics in every form, and what its exact inverse makes of a gradient.

    Args:
        d: Size of the large factor.
    """

    def __init__(self, d: int) -> None:
        self.d = d
        self._generator = torch.Generator().manual_seed(d)
        directions = 4 * EXAMPLES
        lengths = torch.arange(1, directions + 1).pow(-0.75)
        self._base = lengths[:, None] * self._draw(directions, d) / d**0.5
        self.foldings = [self._draw(EXAMPLES, directions) @ self._base for _ in range(FOLDINGS)]
        self.g = self._draw(EXAMPLES, SMALL)
        self.G = (self.g.mT @ self.g / EXAMPLES)[None]
        self.gradient = self._draw(1, SMALL, d)
        weights = [(1 - DECAY if number else 1.0) * DECAY ** (FOLDINGS - 1 - number) for number in range(FOLDINGS)]
        self.rows = torch.cat([(w / EXAMPLES) ** 0.5 * a for w, a in zip(weights, self.foldings, strict=True)])
        self._spectra = exact_spectrum(self.rows), exact_spectrum(self.g / EXAMPLES**0.5)
        self._truths: dict[str, Tensor] = {}

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def factors(self) -> KroneckerFactors:
        """Returns the dense factors."""
        return KroneckerFactors(A=(self.rows.mT @ self.rows)[None], G=self.G)

    def increment(self, number: int) -> Increment:
        """Returns a folding as the methods ask for it that take rows; the small factor is dense, and due at first."""
        rho = DECAY if number else 0.0
        scalar, absent = torch.tensor((1 - rho) * EXAMPLES), torch.zeros(1, 0, 0)
        return Increment(
            A_rows=(1 - rho) ** 0.5 * self.foldings[number][None],
            G_rows=torch.zeros(1, 0, SMALL),
            examples=scalar,
            positions=scalar,
            decay=torch.tensor(rho),
            A=absent,
            G=absent if number else self.G,
        )

    def samples(self) -> Samples:
        """Returns the rows of the newest folding, example by example."""
        ones = torch.ones(EXAMPLES)
        a, g = self.foldings[-1][None, :, None], self.g[None, :, None]
        return Samples(
            a=a, g=g, weight=ones, terms=ones, positions=ones, source=torch.zeros(EXAMPLES, dtype=torch.int64)
        )

    def means(self) -> MeanVectors:
        """Returns the mean vectors of the newest folding."""
        return MeanVectors(a=self.foldings[-1].mean(0)[None], g=self.g.mean(0)[None])

    def truth(self, damping_rule: Any) -> Tensor:
        """Returns the exact inverse of the dense factors, damped by a rule, times the gradient, in float64."""
        if damping_rule not in self._truths:
            trace_A, trace_G = (each.values.sum(-1) for each in self._spectra)
            exact = KroneckerSpectrum.of(*self._spectra, trace_A=trace_A, trace_G=trace_G, damping_rule=damping_rule)
            self._truths[damping_rule] = exact.apply(self.gradient.double(), DAMPING)
        return self._truths[damping_rule]


def exact_spectrum(rows: Tensor) -> Spectrum:
    """Returns all eigenpairs of rows^T rows in float64; those of eigenvalue 0 are left to the tail.

    Args:
        rows: [n, d]; where n is less than d, the pairs are found from rows rows^T.
    """
    rows = rows.double()
    if len(rows) < rows.shape[1]:
        values, vectors = torch.linalg.eigh(rows @ rows.mT)
        kept = values > 1e-14 * values[-1]
        values = values[kept]
        vectors = rows.mT @ (vectors[:, kept] / values.sqrt())
    else:
        values, vectors = torch.linalg.eigh(rows.mT @ rows)
    return Spectrum(vectors.flip(1)[None], values.flip(0)[None].clamp(min=0.0), torch.zeros(1, dtype=torch.float64))
