"""Inverses of Fisher matrices of few examples, by Sherman, Morrison and Woodbury (SENG, arXiv 2006.05924)."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverse import AbstractPreconditioner

BackProjection = Literal["exact", "mean-field"]
Scaling = Literal["unbiased", "published"]

NON_DESCENT = "non_descent"
"""Reason in the block's memory under which applications whose direction pointed uphill are counted."""


@dataclass(frozen=True, kw_only=True)
class SengPreconditioner(AbstractPreconditioner):
    r"""(U U^T + lambda I)^{-1} from the whitened Gram matrix of U; damped at apply.

    With U^T U = Q diag(w) Q^T and R = Q^T U^T scaled to orthonormal rows, the direction is

        d = (v - R^T [w/(w + lambda)] R v)/lambda                            (algorithms.md 6.1)

    or R^T [1/(w + lambda)] R v where R spans everything: then v - R^T R v is nothing but rounding, which 1/lambda would
    make large. A sketch takes U^T U and R v from the same sample of the entries, scaled by s = entries/sampled.

    Sketched, or with the mean-field back-projection, the operator isn't symmetric and may point uphill. So a direction
    with <d, v> <= 0 is replaced by `fallback`, per group, and counted in the memory as "non_descent".

    Attributes:
        values: w, `[c, r]`.
        scaling: "unbiased", or "published": with s on both sides of each product, so s^2 in all. That is the unbiased
            sketch with damping lambda/s in w/(w + lambda).
    """

    damping_at_apply: ClassVar[bool] = True

    values: Tensor
    scaling: Scaling

    @property
    @abstractmethod
    def scale(self) -> float:
        """Entries of the gradient over entries sampled, s; 1 without a sketch."""

    @abstractmethod
    def raw_direction(self, gradient: Float[Tensor, "c p q"], damping: float) -> Float[Tensor, "c p q"]:
        """Computes the direction, whichever way it points."""

    @override
    def _solve(self, gradient: Tensor, damping: float, memory: BlockMemory) -> Tensor:
        direction = self.raw_direction(gradient, damping)
        # Scaled first: squares of float32 numbers below 1e-23 are zero.
        along = (_unit_size(direction) * _unit_size(gradient)).sum((1, 2))
        uphill = ~(along > 0) & (gradient != 0).any(2).any(1)
        memory.count(NON_DESCENT, uphill.any())
        return torch.where(uphill[:, None, None], self.fallback(gradient, damping), direction)

    def _outside(self, damping: float) -> Tensor:
        """Returns the factors `[c, r]` of R v where directions outside R are multiplied by 1/lambda."""
        inner = damping / self.scale if self.scaling == "published" else damping
        return -(self.values / (self.values + inner)) / damping


@dataclass(frozen=True, kw_only=True)
class SengExplicit(SengPreconditioner):
    """Whitened examples, one row each for every entry of the gradient.

    Attributes:
        rows: R, `[c, r, p q]`; below one another those of all sources. Entries are in the order of `order`.
        order: The sampled entries of the flattened gradient and then the others, int64 `[p q]`; `[0]` without a sketch.
        sampled: How many are sampled; p q without a sketch.
        sources: Number of separate operators whose directions are averaged; 1 for one operator of all examples.
        complete: Whether each source's rows span everything.
        d_out: p.
        d_in: q.
    """

    rows: Tensor
    order: Tensor
    sampled: int
    sources: int
    complete: bool
    d_out: int
    d_in: int

    @property
    @override
    def shape(self) -> tuple[int, int, int]:
        return self.rows.shape[0], self.d_out, self.d_in

    @property
    @override
    def scale(self) -> float:
        return self.d_out * self.d_in / self.sampled

    @override
    def raw_direction(self, gradient: Float[Tensor, "c p q"], damping: float) -> Float[Tensor, "c p q"]:
        v = gradient.flatten(1).unsqueeze(-1)
        if self.order.numel():
            v = v.index_select(1, self.order)
        x = self.scale * (self.rows[..., : self.sampled] @ v[:, : self.sampled])
        if self.complete:
            d = self.rows.mT @ (x / (self.values + damping).unsqueeze(-1)) / self.sources
        else:
            d = v / damping + self.rows.mT @ (self._outside(damping).unsqueeze(-1) * x) / self.sources
        if self.order.numel():
            d = torch.empty_like(d).index_copy(1, self.order, d)
        return d.reshape(gradient.shape)


@dataclass(frozen=True, kw_only=True)
class SengImplicit(SengPreconditioner):
    """Examples by the columns of their gradients sum_t g_t a_t^T, which are never formed.

    Attributes:
        a: `[c, n, t, q]`, entries in the order of `order_A`.
        g: `[c, n, t, p]` with the examples' weights, entries in the order of `order_G`.
        whitening: Z = Q diag(w)^{-1/2} with R = Z^T U^T, `[c, n, r]`; block-diagonal over the sources.
        members: 1 where the example (column) is of the source (row), else 0, `[sources, n]`.
        order_A: The sampled inputs and then the others, int64 `[q]`; `[0]` without a sketch.
        order_G: The sampled outputs and then the others, int64 `[p]`; `[0]` without a sketch.
        sampled_A: How many inputs are sampled; q without a sketch.
        sampled_G: How many outputs are sampled; p without a sketch.
        back_projection: "exact" for U b = sum_i b_i g_i a_i^T; "mean-field" for the published code's one product
            (sum_i |b_i|^{1/2} g_i)(sum_i b_i a_i / sum_i |b_i|^{1/2})^T, n times cheaper and far off unless the
            examples are alike (algorithms.md 6.3).
    """

    a: Tensor
    g: Tensor
    whitening: Tensor
    members: Tensor
    order_A: Tensor
    order_G: Tensor
    sampled_A: int
    sampled_G: int
    back_projection: BackProjection

    @property
    @override
    def shape(self) -> tuple[int, int, int]:
        return self.a.shape[0], self.g.shape[-1], self.a.shape[-1]

    @property
    @override
    def scale(self) -> float:
        _, p, q = self.shape
        return (q / self.sampled_A) * (p / self.sampled_G)

    @override
    def raw_direction(self, gradient: Float[Tensor, "c p q"], damping: float) -> Float[Tensor, "c p q"]:
        V = gradient
        if self.order_A.numel():
            V = V.index_select(1, self.order_G).index_select(2, self.order_A)
        x = self.scale * self._inner_products(V)
        y = self.whitening.mT @ x
        factors, rest = self._outside(damping), V / damping
        if self._may_span_everything:
            _, p, q = self.shape
            spans = self.values[:, p * q - 1] > damping
            factors = torch.where(spans[:, None], 1 / (self.values + damping), factors)
            rest = torch.where(spans[:, None, None], 0.0, rest)
        d = rest + self._back(self.whitening @ (factors.unsqueeze(-1) * y)) / self.members.shape[0]
        if self.order_A.numel():
            d = torch.empty_like(d).index_copy(2, self.order_A, d)
            d = torch.empty_like(d).index_copy(1, self.order_G, d)
        return d

    @property
    def _may_span_everything(self) -> bool:
        """Whether there are as many directions as entries, and nothing is approximated."""
        _, p, q = self.shape
        exact = self.back_projection == "exact" and not self.order_A.numel() and self.members.shape[0] == 1
        return exact and self.values.shape[-1] >= p * q

    def _inner_products(self, V: Tensor) -> Tensor:
        """Returns sum_t g_it^T V a_it over the sampled entries, `[c, n, 1]`."""
        c, n, t, _ = self.a.shape
        a, g = self.a[..., : self.sampled_A], self.g[..., : self.sampled_G]
        images = a.reshape(c, n * t, -1) @ V[:, : self.sampled_G, : self.sampled_A].mT
        return (images.view(c, n, t, -1) * g).sum((2, 3)).unsqueeze(-1)

    def _back(self, b: Tensor) -> Tensor:
        """Returns U b, `[c, p, q]`, exactly or in mean field, summed over the sources.

        Args:
            b: `[c, n, 1]`.
        """
        if self.back_projection == "exact":
            weighted = b.unsqueeze(-1) * self.g
            return weighted.flatten(1, 2).mT @ self.a.flatten(1, 2)
        roots = b.abs().sqrt().mT * self.members
        total = roots.sum(-1, keepdim=True)
        shares = (b.mT * self.members) / torch.where(total > 0, total, 1.0)
        mean_g = (roots @ self.g.flatten(2)).unflatten(-1, self.g.shape[2:])
        mean_a = (shares @ self.a.flatten(2)).unflatten(-1, self.a.shape[2:])
        return mean_g.flatten(1, 2).mT @ mean_a.flatten(1, 2)


def _unit_size(tensor: Tensor) -> Tensor:
    """Scales each group's `[c, p, q]` to a largest entry of 1."""
    largest = tensor.abs().amax((1, 2), keepdim=True)
    return tensor / torch.where(largest > 0, largest, 1.0)
