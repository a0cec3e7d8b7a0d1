"""Damped inverses multiplied onto a gradient in its own memory."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kfdist.linalg.kronecker import FactoredInverse


class ProjectedGradient(NamedTuple):
    r"""What a `FactoredInverse` of two factors of low rank needs of a gradient V beside V itself.

    With the factors' inverses I + U_G c_G U_G^T and I + U_A c_A U_A^T, but for a number,

        X = V + U_G c_G P_G + (P_A + U_G c_G C) c_A U_A^T,   P_G = U_G^T V,  P_A = V U_A,  C = P_G U_A
          = V + [U_G c_G, P_A + U_G c_G C] [P_G; c_A U_A^T]

    so that X is summed up in V's memory by one product, one pass over it, and any number that multiplies it rides
    along. A direction whose product with V must be known before its length is needs no memory of its own meanwhile.

    Attributes:
        inverse: Of both sides `scale (I + left right^T)`.
        V: `[c, p, q]`, or `[c, p, q-1]` and the last column `[c, p, 1]`.
        left: U_G c_G and P_A + U_G c_G C, side by side, `[c, p, r_G + r_A]`.
        right: P_G and c_A U_A^T, one above the other, `[c, r_G + r_A, q]`, in as many parts as V.
        inner: C, `[c, r_G, r_A]`.
        squares_A: |P_A,j|^2 of each column, `[c, r_A]`.
    """

    inverse: FactoredInverse
    V: tuple[Float[Tensor, "c p _"], ...]
    left: Float[Tensor, "c p r"]
    right: tuple[Float[Tensor, "c r _"], ...]
    inner: Float[Tensor, "c r_G r_A"]
    squares_A: Float[Tensor, "c r_A"]

    @classmethod
    def of(cls, inverse: FactoredInverse, V: tuple[Float[Tensor, "c p _"], ...]) -> "ProjectedGradient":
        """Projects a gradient, of the inverse's dtype; the inverse is `of_low_rank`."""
        A, G, _ = inverse
        U_A, U_G = A.right, G.right
        assert U_A is not None and U_G is not None, "it is of low rank"
        most, *last = V
        w, r = most.shape[-1], U_G.shape[-1]
        along_A = torch.bmm(most, U_A[:, :w])
        # Small matrices are copied, where each product by itself would read and write all of V.
        right = most.new_empty(len(most), r + U_A.shape[-1], w)
        torch.bmm(U_G.mT, most, out=right[:, :r])
        right[:, r:].copy_(A.left[:, :w].mT)
        parts = [right]
        if last:
            along_A.baddbmm_(last[0], U_A[:, w:])
            parts.append(torch.cat([torch.bmm(U_G.mT, last[0]), A.left[:, w:].mT], dim=1))
        if U_G.shape[-2] < U_A.shape[-2]:  # by way of the shorter dimension
            inner = torch.bmm(U_G.mT, along_A)
        else:
            inner = torch.bmm(right[:, :r], U_A[:, :w])
            inner = inner.baddbmm_(parts[1][:, :r], U_A[:, w:]) if last else inner
        squares = along_A.square().sum(1)
        left = torch.cat([G.left, along_A.baddbmm_(G.left, inner)], dim=-1)
        return cls(inverse, V, left, tuple(parts), inner, squares)

    def product(self) -> Float[Tensor, "1"] | None:
        """Returns <X, V> of a single matrix; None where rounding decides on it. Compares numbers, so only on the host.

        <X, V> = |V|^2 + sum_i c_G,i |P_G,i|^2 + sum_j c_A,j (|P_A,j|^2 + sum_i c_G,i C_ij^2), and all c lie between -1
        and 0: of a result that is small beside |V|^2, only what was rounded is left.
        """
        c_A, c_G = self.inverse.A.weights, self.inverse.G.weights
        assert c_A is not None and c_G is not None, "it is of low rank"
        length = torch.stack([torch.dot(each.view(-1), each.view(-1)) for each in self.V]).sum()
        along_G = [torch.linalg.vector_norm(each[:, : c_G.shape[-1]], dim=2).square_() for each in self.right]
        of_G = along_G[0] if len(along_G) == 1 else along_G[0] + along_G[1]
        of_A = self.squares_A + torch.bmm(c_G.unsqueeze(1), self.inner.square()).squeeze(1)
        found = torch.dot(c_G.view(-1), of_G.view(-1)) + torch.dot(c_A.view(-1), of_A.view(-1)) + length
        lost = float(found) < torch.finfo(found.dtype).eps ** 0.5 * float(length)
        return None if lost else found.view(1)

    def overwrite(self, scale: float) -> None:
        """Makes of V `scale` times X."""
        for each, right in zip(self.V, self.right, strict=True):
            each.baddbmm_(self.left, right, beta=scale, alpha=scale)
