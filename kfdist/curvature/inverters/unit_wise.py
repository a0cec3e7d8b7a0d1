"""The Fisher matrix of single units, inverted as it is (Osawa et al., arXiv 1811.12019, 2002.06015)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.curvature.inverter import AbstractInverter, Estimate, Inversion, Operation, Placement, Work
from kfdist.curvature.statistics import Needs, UnitFisher
from kfdist.types import BlockShape


@dataclass(frozen=True, kw_only=True)
class UnitWiseInverse(AbstractPreconditioner):
    """The inverses of F_c + lambda I, of 1 x 1 or 2 x 2 numbers; `trace_G` is 1.

    Attributes:
        F: `[c, k, k]`.
    """

    damping_at_apply: ClassVar[bool] = True

    F: Tensor

    @property
    @override
    def shape(self) -> tuple[int, int, int]:
        return self.F.shape[0], 1, self.F.shape[-1]

    @override
    def _solve(self, gradient: Tensor, damping: float, memory: BlockMemory) -> Tensor:
        inverse = self.damped(damping, memory)
        if inverse.shape[-1] == 1:
            return gradient * inverse
        return (inverse * gradient).sum(-1).unsqueeze(1).to(gradient.dtype)

    def damped(self, damping: float, memory: BlockMemory) -> Float[Tensor, "c k k"]:
        """Returns (F_c + lambda I)^{-1}, which the memory keeps: of 2 x 2 numbers in float64."""
        return memory.form(self, lambda: self._inverse(damping), damping)

    def _inverse(self, damping: float) -> Tensor:
        """Returns (F_c + lambda I)^{-1}; of 2 x 2 numbers in float64: they may move together, and cancel."""
        if self.F.shape[-1] == 1:
            return 1 / (self.F + damping)
        F = self.F.double()
        first = F[:, 0, 0] + damping
        ratio = F[:, 0, 1] / first
        # The Schur complement; F is positive semi-definite, so it is no smaller than lambda but for rounding.
        second = (F[:, 1, 1] + damping - ratio * F[:, 0, 1]).clamp_min(damping)
        off = -ratio / second
        return torch.stack([1 / first - ratio * off, off, off, 1 / second], dim=-1).view_as(F)


@dataclass(frozen=True, kw_only=True)
class UnitWise(AbstractInverter):
    """Takes the block of each unit as it is: F_c = E[v v^T] for the gradient v of one example.

    The ranks invert for themselves; there is no job. Blocks of scales and shifts have this method whatever the others
    have.
    """

    name: ClassVar[str] = "unit-wise"
    statistic: ClassVar[type] = UnitFisher
    produces: ClassVar[type[AbstractPreconditioner]] = UnitWiseInverse
    placement: ClassVar[Placement] = Placement.WORKER
    patient: ClassVar[bool] = True

    @override
    def needs(self, shape: BlockShape) -> Needs:
        del shape
        return Needs(sums=frozenset({"F"}))

    @override
    def invert(self, statistics: UnitFisher, *, damping: float, previous: Mapping[str, Tensor], seed: int) -> Inversion:
        del damping, previous, seed
        trace = statistics.F.diagonal(dim1=-2, dim2=-1).sum(-1)
        made = UnitWiseInverse(trace_A=trace, trace_G=torch.ones_like(trace), F=statistics.F)
        return Inversion(preconditioner=made)

    @override
    def estimate(self, shape: BlockShape) -> Estimate:
        """Counts nothing but the matrix itself."""
        return Estimate([Work(Operation.PRODUCTS, 0.0)], shape.d_in**2, 2 * shape.d_in**2)
