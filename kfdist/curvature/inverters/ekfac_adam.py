"""Adam in K-FAC's eigenbasis: bases on the owner, moments on the ranks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from kfdist import checks
from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.curvature.inverter import AbstractInverter, Estimate, Inversion, Operation, Outcome, Work
from kfdist.curvature.spectra import EIGH_FLOPS, full_spectra
from kfdist.curvature.statistics import KroneckerFactors
from kfdist.linalg.psd import trace
from kfdist.types import BlockShape

_FIRST, _SECOND, _FIRST_WEIGHT, _SECOND_WEIGHT = "first", "second", "first_weight", "second_weight"


@dataclass(frozen=True, kw_only=True)
class AdamBasis(AbstractPreconditioner):
    r"""The eigenvectors of both factors; the ranks keep Adam's moments of the gradient's coordinates in them.

    With R = Q_G^T V Q_A, each step has

        m <- beta1 m + (1 - beta1) R          n = (beta1 m + (1 - beta1) R) / (1 - beta1^(t+1))
        v <- beta2 v + (1 - beta2) R^2        U = Q_G [n / (sqrt(v / (1 - beta2^t)) + eps)] Q_A^T

    entry by entry: Adam (Kingma and Ba, arXiv 1412.6980) with Nesterov's momentum (Dozat, 2016), in the basis in which
    EKFAC has its scales (George et al., arXiv 1806.03884), as SOAP is Adam in Shampoo's (Vyas et al., arXiv
    2409.11321). When another basis comes into use, m is turned into it and v stays, eigenpairs being in order of their
    eigenvalues; but v is raised to m's square, without bias, where it is less. It never is where the two are of one
    coordinate, and where eigenvectors have changed places a step would be longer without bound.

    A direction given outside a training's steps learns nothing and takes V in the place of n. Before any step it is
    `fallback`'s.

    Attributes:
        Q_A: Eigenvectors of A in columns, `[c, q, q]`.
        Q_G: Eigenvectors of G in columns, `[c, p, p]`.
        beta1: Decay of the first moment m.
        beta2: Decay of the second moment v.
        eps: Added to the root of v.
    """

    damping_at_apply: ClassVar[bool] = True
    keeps_memory: ClassVar[bool] = True
    normalised: ClassVar[bool] = True
    solves: ClassVar[bool] = False

    Q_A: Tensor
    Q_G: Tensor
    beta1: float
    beta2: float
    eps: float

    @property
    @override
    def shape(self) -> tuple[int, int, int]:
        return self.Q_A.shape[0], self.Q_G.shape[-1], self.Q_A.shape[-1]

    def coordinates(self, matrix: Float[Tensor, "c p q"]) -> Float[Tensor, "c p q"]:
        """Returns Q_G^T X Q_A."""
        return self.Q_G.mT @ matrix @ self.Q_A

    def matrix(self, coordinates: Float[Tensor, "c p q"]) -> Float[Tensor, "c p q"]:
        """Returns the matrix that has these coordinates."""
        return self.Q_G @ coordinates @ self.Q_A.mT

    @override
    def take_over(self, before: AbstractPreconditioner, memory: BlockMemory) -> None:
        """Turns the first moment from the basis of `before` into this one, and raises the second to its square."""
        if not isinstance(before, AdamBasis) or _FIRST not in memory.kept:
            return
        kept = memory.kept
        kept[_FIRST] = self.coordinates(before.matrix(kept[_FIRST]))
        squared = (kept[_FIRST] / _positive(kept[_FIRST_WEIGHT])).square_()
        kept[_SECOND] = torch.maximum(kept[_SECOND], squared.mul_(kept[_SECOND_WEIGHT]))

    @override
    def _solve(self, gradient: Tensor, damping: float, memory: BlockMemory) -> Tensor:
        R = self.coordinates(gradient)
        if memory.learns is not False:
            R = self._learn(R, memory)
        elif _SECOND not in memory.kept:
            return self.fallback(gradient, damping)
        kept = memory.kept
        root = (kept[_SECOND] / _positive(kept[_SECOND_WEIGHT])).sqrt_().add_(self.eps)
        return self.matrix(R.div_(root))

    def _learn(self, R: Tensor, memory: BlockMemory) -> Tensor:
        """Folds R into the moments, unless the step is skipped; returns Nesterov's average n. R is overwritten."""
        kept = memory.kept
        if _SECOND not in kept:
            kept |= {name: torch.zeros_like(R) for name in (_FIRST, _SECOND)}
            kept |= {name: R.new_zeros(()) for name in (_FIRST_WEIGHT, _SECOND_WEIGHT)}
        one = R.new_ones(())
        if isinstance(memory.learns, Tensor):
            # A skipped step has weight zero; its gradient, which may not be finite, must not be multiplied by that.
            R, one = torch.where(memory.learns, R, 0.0), memory.learns.to(R.dtype)
        fresh1, fresh2 = one * (1 - self.beta1), one * (1 - self.beta2)
        first = kept[_FIRST].lerp_(R, fresh1)
        kept[_SECOND].lerp_(R.square(), fresh2)
        # 1 - beta^t, by the moments' own recursion.
        first_weight = kept[_FIRST_WEIGHT].lerp_(torch.ones_like(one), fresh1)
        kept[_SECOND_WEIGHT].lerp_(torch.ones_like(one), fresh2)
        return torch.lerp(first, R, 1 - self.beta1).div_(torch.lerp(first_weight, torch.ones_like(one), 1 - self.beta1))


def _positive(weight: Tensor) -> Tensor:
    """Keeps quotients defined before the first step that wasn't skipped."""
    return weight.clamp_min(torch.finfo(weight.dtype).tiny)


@dataclass(frozen=True, kw_only=True)
class EkfacAdam(AbstractInverter):
    """Decomposes both factors for their eigenvectors alone; the ranks then keep Adam's moments in them.

    Attributes:
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
    """

    name: ClassVar[str] = "ekfac-adam"
    produces: ClassVar[type[AbstractPreconditioner]] = AdamBasis

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            checks.number(name, getattr(self, name), least=0, below=1)
        checks.number("eps", self.eps, above=0)

    @override
    def invert(
        self, statistics: KroneckerFactors, *, damping: float, previous: Mapping[str, Tensor], seed: int
    ) -> Inversion:
        del damping, previous
        A, G = full_spectra(statistics, seed)
        return Inversion(
            preconditioner=AdamBasis(
                trace_A=trace(statistics.A),
                trace_G=trace(statistics.G),
                Q_A=A.spectrum.vectors,
                Q_G=G.spectrum.vectors,
                beta1=self.beta1,
                beta2=self.beta2,
                eps=self.eps,
            ),
            outcome=Outcome.worst(A.outcome, G.outcome),
            diagnostics={**A.diagnostics, **G.diagnostics},
        )

    @override
    def estimate(self, shape: BlockShape) -> Estimate:
        """Counts two full eigendecompositions, both bases and both moments."""
        sizes = shape.d_in, shape.d_out
        work = [Work(Operation.EIGH, EIGH_FLOPS * d**3) for d in sizes]
        return Estimate(work, sum(d * d for d in sizes), prepared=2 * shape.d_in * shape.d_out)
