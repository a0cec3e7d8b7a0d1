"""Eva: curvature from mean vectors (Zhang, Shi, Wang, Li, ICLR 2023; algorithms.md 7.7)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.curvature.inverter import AbstractInverter, Estimate, Inversion, Operation, Placement, Work
from kfdist.curvature.statistics import MeanVectors, Needs
from kfdist.types import BlockShape


@dataclass(frozen=True, kw_only=True)
class EvaPreconditioner(AbstractPreconditioner):
    """The inverse of (a a^T) (x) (g g^T) + lambda I: (1/lambda) [V - (g^T V a)/(lambda + |a|^2 |g|^2) g a^T].

    Its traces are |a|^2 and |g|^2.

    Attributes:
        a: `[c, q]`.
        g: `[c, p]`.
    """

    damping_at_apply: ClassVar[bool] = True

    a: Tensor
    g: Tensor

    @property
    @override
    def shape(self) -> tuple[int, int, int]:
        return self.a.shape[0], self.g.shape[-1], self.a.shape[-1]

    @override
    def _solve(self, gradient: Tensor, damping: float, memory: BlockMemory) -> Tensor:
        del memory
        a, g = self.a.unsqueeze(-2), self.g.unsqueeze(-1)
        along = g.mT @ gradient @ a.mT  # [c, 1, 1]
        share = along / (damping + self.trace_A * self.trace_G)[:, None, None]
        return torch.baddbmm(gradient, g, share * a, beta=1 / damping, alpha=-1 / damping)


@dataclass(frozen=True, kw_only=True)
class Eva(AbstractInverter):
    """Takes the block for (a a^T) (x) (g g^T), a and g being the mean input and the mean output gradient.

    Statistics, memory and inversion are of size p + q. Equals `kfac-eigen` on the rank-one parts of its factors. Here
    the means are over all examples, g is of the per-example loss, and `ema_decay` weighs the past; in the published
    code they are over 16 examples, g lacks the factor N and the decay weighs the newest mean (algorithms.md 7.7).
    """

    name: ClassVar[str] = "eva"
    statistic: ClassVar[type] = MeanVectors
    produces: ClassVar[type[AbstractPreconditioner]] = EvaPreconditioner
    placement: ClassVar[Placement] = Placement.WORKER

    @override
    def needs(self, shape: BlockShape) -> Needs:
        del shape
        return Needs(sums=frozenset({"a", "g"}))

    @override
    def invert(
        self, statistics: MeanVectors, *, damping: float, previous: Mapping[str, Tensor], seed: int
    ) -> Inversion:
        del damping, previous, seed
        a, g = statistics.a, statistics.g
        return Inversion(
            preconditioner=EvaPreconditioner(trace_A=a.square().sum(-1), trace_G=g.square().sum(-1), a=a, g=g)
        )

    @override
    def estimate(self, shape: BlockShape) -> Estimate:
        """Counts the squared lengths, and both vectors."""
        size = shape.d_in + shape.d_out
        return Estimate([Work(Operation.PRODUCTS, 2.0 * size)], size)
