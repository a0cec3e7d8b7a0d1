"""SOAP: Adam in Shampoo's eigenbasis; bases on the owner, moments on the ranks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from kfdist import checks
from kfdist.curvature.adam_moments import SECOND, AbstractAdamBasis
from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.gradient_inverter import AbstractGradientInverter
from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.curvature.inverter import Estimate, Inversion, Operation, Outcome, Work
from kfdist.curvature.mode_vectors import AbstractModeVectors, means, mode_spectra, vector_fields
from kfdist.curvature.spectra import EIGH_FLOPS
from kfdist.curvature.statistics import GradientMoments
from kfdist.linalg.psd import trace
from kfdist.types import BlockShape

SecondMoments = Literal["permute", "estimate"]


@dataclass(frozen=True, kw_only=True)
class ModeBasis(AbstractModeVectors, AbstractAdamBasis):
    r"""Eigenvectors of the gradient's second moment along each mode; the ranks keep Adam's moments in them.

    R is V with Q_i^T along each mode, and momentum is Adam's own. When another basis comes into use, the rows of v
    along each mode are put in the order of what their old vectors have in the new moment, diag(Q_old^T M Q_old),
    descending, as published; or v is estimated, as if coordinates were uncorrelated, by the squares of Q_new^T Q_old.

    Attributes:
        w_1: The eigenvalues, `[c, d_1]`; `[c, 0]` for modes that aren't there, likewise.
        w_2: The second mode's.
        w_3: The third's.
        w_4: The fourth's.
        second_moments: Which of the two becomes of v.
    """

    nesterov: ClassVar[bool] = False

    w_1: Tensor
    w_2: Tensor
    w_3: Tensor
    w_4: Tensor
    second_moments: SecondMoments

    @override
    def second_moment(self, before: AbstractAdamBasis, memory: BlockMemory) -> Float[Tensor, "c p q"]:
        assert isinstance(before, ModeBasis), "take_over lets no other through"
        v = memory.kept[SECOND]
        squares = self.squares(before)
        if self.second_moments == "estimate":
            return self.multiplied(v, squares)
        tensors = v.reshape(len(v), *self.modes)
        values = (self.w_1, self.w_2, self.w_3, self.w_4)
        for mode, (square, w) in enumerate(zip(squares, values, strict=False), start=1):
            order = (w.unsqueeze(-2) @ square).squeeze(-2).argsort(dim=-1, descending=True, stable=True)
            index = order.view(len(order), *(-1 if place == mode else 1 for place in range(1, tensors.dim())))
            tensors = tensors.gather(mode, index.expand(tensors.shape))
        return tensors.reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class Soap(AbstractGradientInverter):
    """Decomposes the gradient's second moments for their eigenvectors alone (Vyas et al., arXiv 2409.11321).

    The ranks then keep Adam's moments in them.

    Attributes:
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        second_moments: What becomes of them in a new basis: "permute" as published, or "estimate" (`ModeBasis`).
    """

    name: ClassVar[str] = "soap"
    produces: ClassVar[type[AbstractPreconditioner]] = ModeBasis

    beta1: float = 0.95
    beta2: float = 0.95
    eps: float = 1e-8
    second_moments: SecondMoments = "permute"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2"):
            checks.number(name, getattr(self, name), least=0, below=1)
        checks.number("eps", self.eps, above=0)
        checks.choice("second_moments", self.second_moments, ("permute", "estimate"))

    @override
    def invert(
        self, statistics: GradientMoments, *, damping: float, previous: Mapping[str, Tensor], seed: int
    ) -> Inversion:
        del damping, previous
        moments = means(statistics)
        found, total = mode_spectra(moments, seed), trace(moments[0])
        absent = [total.new_zeros(len(total), 0)] * (4 - len(found))
        w = [*(each.spectrum.values for each in found), *absent]
        return Inversion(
            preconditioner=ModeBasis(
                trace_A=total,
                trace_G=torch.ones_like(total),
                **vector_fields(found),
                **{f"w_{mode}": each for mode, each in enumerate(w, start=1)},
                beta1=self.beta1,
                beta2=self.beta2,
                eps=self.eps,
                second_moments=self.second_moments,
            ),
            outcome=Outcome.worst(*(each.outcome for each in found)),
            diagnostics={name: value for each in found for name, value in each.diagnostics.items()},
        )

    @override
    def estimate(self, shape: BlockShape) -> Estimate:
        """Counts a full eigendecomposition of each mode, the bases with their eigenvalues, and both moments."""
        sizes = shape.dimensions
        work = [Work(Operation.EIGH, EIGH_FLOPS * d**3) for d in sizes]
        return Estimate(work, sum(d * (d + 1) for d in sizes), prepared=2 * math.prod(sizes))
