"""Eigenvectors along each mode of a gradient, as an owner finds them and ranks multiply by them."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.curvature.spectra import FactorSpectrum, full_spectrum
from kfdist.curvature.statistics import GradientMoments
from kfdist.linalg.modes import mode_products


@dataclass(frozen=True, kw_only=True)
class AbstractModeVectors(AbstractPreconditioner):
    """A basis of orthonormal vectors along each mode of a gradient's tensors.

    `trace_A` is the trace of the gradient's second moment, and `trace_G` is 1.

    Attributes:
        eps: Added to roots of second moments.
        Q_1: Eigenvectors in columns, `[c, d_1, d_1]`, those of the largest eigenvalue first; `[c, 0, 0]` for modes that
            aren't there, likewise.
        Q_2: The second mode's.
        Q_3: The third's.
        Q_4: The fourth's.
    """

    eps: float

    Q_1: Tensor
    Q_2: Tensor
    Q_3: Tensor
    Q_4: Tensor

    @property
    def bases(self) -> list[Float[Tensor, "_ _ _"]]:
        """Those of the modes there are."""
        return [each for each in (self.Q_1, self.Q_2, self.Q_3, self.Q_4) if each.shape[-1]]

    @property
    def modes(self) -> tuple[int, ...]:
        """The dimensions of the tensors."""
        return tuple(each.shape[-1] for each in self.bases)

    @property
    @override
    def shape(self) -> tuple[int, int, int]:
        modes = self.modes
        return len(self.Q_1), modes[0], math.prod(modes[1:])

    def multiplied(self, matrix: Float[Tensor, "c p q"], along: list[Float[Tensor, "_ _ _"]]) -> Float[Tensor, "c p q"]:
        """Multiplies a matrix onto each mode of a gradient."""
        return mode_products(matrix.reshape(len(matrix), *self.modes), along).reshape(self.shape)

    def coordinates(self, matrix: Float[Tensor, "c p q"]) -> Float[Tensor, "c p q"]:
        """Returns the coordinates of a gradient, in a tensor of their own."""
        return self.multiplied(matrix, [Q.mT for Q in self.bases])

    def matrix(self, coordinates: Float[Tensor, "c p q"], scale: float = 1.0) -> Float[Tensor, "c p q"]:
        """Returns `scale` times the gradient that has these coordinates."""
        matrix = self.multiplied(coordinates, self.bases)
        return matrix if scale == 1.0 else matrix.mul_(scale)

    def squares(self, before: "AbstractModeVectors") -> list[Float[Tensor, "_ _ _"]]:
        """Returns the squared entries of Q^T Q_before of each mode."""
        return [(new.mT @ old).square() for new, old in zip(self.bases, before.bases, strict=True)]

    @override
    def fallback(self, gradient: Float[Tensor, "c p q"], damping: float) -> Float[Tensor, "c p q"]:
        """Scales a gradient to the size of Adam's, by the root of its entries' mean square so far."""
        del damping
        scale = (self.trace_A / math.prod(self.modes)).sqrt().add(self.eps).view(-1, 1, 1)
        return (gradient.to(scale.dtype) / scale).to(gradient.dtype)


def mode_spectra(moments: list[Float[Tensor, "_ _ _"]], seed: int) -> list[FactorSpectrum]:
    """Decomposes the moments of the modes there are in full."""
    return [full_spectrum(M, rank=M.shape[-1], seed=seed, label=str(mode)) for mode, M in enumerate(moments, start=1)]


def means(statistics: GradientMoments) -> list[Float[Tensor, "_ _ _"]]:
    """Returns the mean moments of the modes there are, over what was summed."""
    return [each / statistics.weight.view(-1, 1, 1) for each in statistics.sums]


def vector_fields(found: list[FactorSpectrum]) -> dict[str, Float[Tensor, "_ _ _"]]:
    """Returns the fields Q_1 to Q_4, of which those after the last mode hold no numbers."""
    vectors = [each.spectrum.vectors for each in found]
    absent = [torch.zeros_like(vectors[0][:, :0, :0])] * (4 - len(vectors))
    return {f"Q_{mode}": each for mode, each in enumerate([*vectors, *absent], start=1)}
