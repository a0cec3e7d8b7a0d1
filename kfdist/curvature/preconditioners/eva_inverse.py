"""Eva: a rank-one block, inverted by Sherman and Morrison (Zhang, Shi, Wang, Li, ICLR 2023; algorithms.md 7.7)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kfdist.curvature.inverse import AbstractPreconditioner, Memory


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
    def shape(self) -> tuple[int, int, int]:
        """Shape (c, p, q) of the gradients it takes."""
        return self.a.shape[0], self.g.shape[-1], self.a.shape[-1]

    def _solve(self, gradient: Tensor, damping: float, memory: Memory) -> Tensor:
        del memory
        a, g = self.a.unsqueeze(-2), self.g.unsqueeze(-1)
        along = g.mT @ gradient @ a.mT  # [c, 1, 1]
        share = along / (damping + self.trace_A * self.trace_G)[:, None, None]
        return (gradient - share * g * a) / damping
