"""KL-Shampoo: bases on the owner; the ranks go on measuring the eigenvalues in them (docs/decisions/0030)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from kfdist import checks
from kfdist.curvature.adam_moments import FIRST, FIRST_WEIGHT, never_zero
from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.gradient_inverter import AbstractGradientInverter
from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.curvature.inverter import Estimate, Inversion, Operation, Outcome, Work
from kfdist.curvature.mode_vectors import AbstractModeVectors, means, mode_spectra, vector_fields
from kfdist.curvature.spectra import EIGH_FLOPS
from kfdist.curvature.statistics import MODES, GradientMoments
from kfdist.linalg.modes import mode_moment, mode_product
from kfdist.linalg.psd import trace
from kfdist.types import BlockShape

VALUES = ("values_1", "values_2", "values_3", "values_4")
"""What a block's memory keeps beside Adam's first moment and its weight: the eigenvalues of each mode, `[c, d]`."""


@dataclass(frozen=True, kw_only=True)
class KlBasis(AbstractModeVectors):
    r"""Eigenvectors of each mode's factor S_i; the ranks keep its eigenvalues lambda_i, and momentum, in them.

    The covariance of the gradient is the Kronecker product of the S_i. Each step has, with C = V with Q_i^T along each
    mode, for a matrix (Lin et al., arXiv 2509.03378; the mean over a mode's index is over all other modes' in general),

        m <- beta1 m + (1 - beta1) C
        lambda_1 <- beta2 lambda_1 + (1 - beta2) mean_j (C_ij^2 + kappa) / lambda_2j,    lambda_2 likewise
        U = Q_1 [ m / (1 - beta1^t) / (sqrt(lambda_1 lambda_2^T) + eps) ] Q_2^T

    where each is measured by the others as they were before the step. kappa is the paper's damping, here a share of the
    mean second moment, the product of the means of all lambda. Where no gradient was seen but zeros, every lambda
    begins as (mean C^2)^(1/k) of k modes, the best multiple of I: scaling a gradient changes no direction but by eps.

    When another basis comes into use, m is turned into it, and lambda_i becomes the diagonal of what it stood for, the
    squared entries of Q_new^T Q_old times lambda_i: no scale jumps, and what bases misjudge is measured anew.

    A direction given outside a training's steps learns nothing and takes V in the place of m. Before any step it is
    `fallback`'s.

    Attributes:
        beta1: Decay of the first moment m.
        beta2: Decay of the eigenvalues.
        kappa: A share of the mean second moment.
    """

    damping_at_apply: ClassVar[bool] = True
    keeps_memory: ClassVar[bool] = True
    normalised: ClassVar[bool] = True
    solves: ClassVar[bool] = False

    beta1: float
    beta2: float
    kappa: float

    def values(self, memory: BlockMemory) -> list[Float[Tensor, "_ _"]]:
        """Returns the eigenvalues of each mode; none before any step."""
        return [memory.kept[name] for name in VALUES if name in memory.kept]

    @override
    def take_over(self, before: AbstractPreconditioner, memory: BlockMemory) -> None:
        """Turns momentum from the basis of `before` into this one, and has the eigenvalues follow."""
        if not isinstance(before, KlBasis) or FIRST not in memory.kept:
            return
        memory.kept[FIRST] = self.coordinates(before.matrix(memory.kept[FIRST]))
        for name, value, square in zip(VALUES, self.values(memory), self.squares(before), strict=False):
            memory.kept[name] = (square @ value.unsqueeze(-1)).squeeze(-1)

    @override
    def _solve(self, gradient: Tensor, damping: float, memory: BlockMemory) -> Tensor:
        C = self.coordinates(gradient)
        if memory.learns is not False:
            C = self._learn(C, memory)
        elif FIRST not in memory.kept:
            return self.fallback(gradient, damping)
        root = C.new_ones(len(C), 1)
        for value in self.values(memory):
            root = (root.unsqueeze(-1) * value.sqrt().unsqueeze(1)).flatten(1)
        return self.matrix(C.div_(root.add_(self.eps).view(self.shape)))

    def _learn(self, C: Tensor, memory: BlockMemory) -> Tensor:
        """Folds C into momentum and eigenvalues, unless the step is skipped; returns m without its bias, over C."""
        kept, learned = memory.kept, memory.learns
        if FIRST not in kept:
            kept |= {FIRST: torch.zeros_like(C), FIRST_WEIGHT: C.new_zeros(())}
            kept |= {name: C.new_zeros(len(C), d) for name, d in zip(VALUES, self.modes, strict=False)}
        weigh1, weigh2 = 1 - self.beta1, 1 - self.beta2
        if isinstance(learned, Tensor):  # a skipped step has weight zero; what isn't finite mustn't be multiplied by it
            C = torch.where(learned, C, 0.0)
            weigh1, weigh2 = (learned.to(C.dtype) * each for each in (weigh1, weigh2))
        kept[FIRST].lerp_(C, weigh1)
        kept[FIRST_WEIGHT].lerp_(torch.ones_like(kept[FIRST_WEIGHT]), weigh1)
        values = begun(self.values(memory), C)
        for name, value, found in zip(VALUES, values, self._measured(C, values), strict=False):
            kept[name] = value.lerp(found, weigh2)
        return torch.div(kept[FIRST], never_zero(kept[FIRST_WEIGHT], C.dtype), out=C)

    def _measured(self, C: Tensor, values: Sequence[Tensor]) -> list[Tensor]:
        """Returns what one gradient says of each mode's eigenvalues, by the others' as they are."""
        squares = C.square().reshape(len(C), *self.modes)
        shares = [(1.0 / _above_zero(value) / value.shape[-1]).unsqueeze(1) for value in values]
        kappa = math.prod(
            (value.mean(1) for value in values), start=torch.full_like(squares.flatten(1)[:, 0], self.kappa)
        )
        found = []
        for mode in range(len(values)):
            others = [(place, share) for place, share in enumerate(shares) if place != mode]
            summed, added = squares, kappa
            for place, share in others:
                summed, added = mode_product(summed, share, place), added * share.sum((1, 2))
            found.append(summed.flatten(1) + added.unsqueeze(1))
        return found


def begun(values: Sequence[Float[Tensor, "_ _"]], tensors: Float[Tensor, "c ..."]) -> list[Float[Tensor, "_ _"]]:
    """Returns the eigenvalues; (mean of the squares)^(1/k) of k modes, which is all that is known, where they are 0."""
    start = tensors.square().flatten(1).mean(1, keepdim=True).pow(1.0 / len(values))
    unseen = torch.stack([value.amax(1) for value in values]).amin(0).unsqueeze(1) <= 0
    return [torch.where(unseen, start, value) for value in values]


def _in_use(
    inverse: AbstractPreconditioner | None, memory: BlockMemory, tensor: Float[Tensor, "c ..."]
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns bases and eigenvalues by which a gradient is weighed; before any, the axes and what it says of itself."""
    values = inverse.values(memory) if isinstance(inverse, KlBasis) else []
    if isinstance(inverse, KlBasis) and values:
        return [Q.to(tensor) for Q in inverse.bases], begun([value.to(tensor) for value in values], tensor)
    c, *dims = tensor.shape
    axes = [torch.eye(d, dtype=tensor.dtype, device=tensor.device).expand(c, d, d) for d in dims]
    return axes, begun([tensor.new_zeros(c, d) for d in dims], tensor)


def _above_zero(value: Tensor) -> Tensor:
    return value.clamp_min(torch.finfo(value.dtype).tiny)


@dataclass(frozen=True, kw_only=True)
class KlShampoo(AbstractGradientInverter):
    r"""Decomposes the factors S_i of the gradient's covariance for their eigenvectors (Lin et al., arXiv 2509.03378).

    Of a matrix, S_1 averages G S_2^-1 G^T / d_2 and S_2 averages G^T S_1^-1 G / d_1, each by the other as it is in use:
    what minimises the Kullback-Leibler divergence from N(0, E[g g^T]) to N(0, S_1 (x) S_2). Of k modes each is measured
    by all others. The ranks keep the eigenvalues themselves, and momentum (`KlBasis`).

    Attributes:
        beta1: Decay of the first moment.
        beta2: Decay of the eigenvalues.
        eps: Added to the root of the eigenvalues' product.
        kappa: Added to all second moments, as a share of the mean one; 0 for nothing.
    """

    name: ClassVar[str] = "kl-shampoo"
    produces: ClassVar[type[AbstractPreconditioner]] = KlBasis

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    kappa: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2"):
            checks.number(name, getattr(self, name), least=0, below=1)
        checks.number("eps", self.eps, above=0)
        checks.number("kappa", self.kappa, least=0, below=1)

    @override
    def moments(
        self, tensor: Float[Tensor, "c ..."], inverse: AbstractPreconditioner | None, memory: BlockMemory
    ) -> dict[str, Float[Tensor, "c p p"]]:
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        bases, values = _in_use(inverse, memory, tensor)
        # Along Q (d lambda)^(-1/2) a gradient has the second moments that it has by S^-1 / d.
        weighed = [
            Q.mT * _above_zero(value * len(value[0])).rsqrt().unsqueeze(-1)
            for Q, value in zip(bases, values, strict=True)
        ]
        found = {}
        for mode, name in zip(range(len(bases)), MODES, strict=False):
            X = tensor
            for place, matrix in enumerate(weighed):
                X = X if place == mode else mode_product(X, matrix, place)
            found[name] = mode_moment(X, mode)
        return found

    @override
    def invert(
        self, statistics: GradientMoments, *, damping: float, previous: Mapping[str, Tensor], seed: int
    ) -> Inversion:
        del damping, previous
        moments = means(statistics)
        found, traces = mode_spectra(moments, seed), [trace(M) for M in moments]
        total = math.prod(traces, start=torch.ones_like(traces[0]))
        return Inversion(
            preconditioner=KlBasis(
                trace_A=total,
                trace_G=torch.ones_like(total),
                **vector_fields(found),
                beta1=self.beta1,
                beta2=self.beta2,
                eps=self.eps,
                kappa=self.kappa,
            ),
            outcome=Outcome.worst(*(each.outcome for each in found)),
            diagnostics={name: value for each in found for name, value in each.diagnostics.items()},
        )

    @override
    def estimate(self, shape: BlockShape) -> Estimate:
        """Counts a full eigendecomposition of each mode, the bases, and what the ranks keep in them."""
        sizes = shape.dimensions
        work = [Work(Operation.EIGH, EIGH_FLOPS * d**3) for d in sizes]
        return Estimate(work, sum(d * d for d in sizes), prepared=math.prod(sizes) + sum(sizes))
