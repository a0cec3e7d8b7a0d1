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

    so that X can be summed up in V's memory, one pass over it a side, and any number that multiplies it rides along. A
    direction whose product with V must be known before its length is needs no memory of its own meanwhile.

    Attributes:
        inverse: Of both sides `scale (I + left right^T)`.
        V: `[c, p, q]`, or `[c, p, q-1]` and the last column `[c, p, 1]`.
        along_G: P_G, `[c, r_G, q]`.
        along_A: P_A + U_G c_G C, `[c, p, r_A]`.
        inner: C, `[c, r_G, r_A]`.
        lengths_A: Of P_A's columns, `[c, r_A]`.
    """

    inverse: FactoredInverse
    V: tuple[Float[Tensor, "c p _"], ...]
    along_G: Float[Tensor, "c r_G q"]
    along_A: Float[Tensor, "c p r_A"]
    inner: Float[Tensor, "c r_G r_A"]
    lengths_A: Float[Tensor, "c r_A"]

    @classmethod
    def of(cls, inverse: FactoredInverse, V: tuple[Float[Tensor, "c p _"], ...]) -> "ProjectedGradient":
        """Projects a gradient, of the inverse's dtype; the inverse is `of_low_rank`."""
        U_A, U_G = inverse.A.right, inverse.G.right
        assert U_A is not None and U_G is not None, "it is of low rank"
        most, *last = V
        if last:
            along_A = torch.bmm(most, U_A[:, :-1]).baddbmm_(last[0], U_A[:, -1:])
            along_G = torch.cat([torch.bmm(U_G.mT, most), torch.bmm(U_G.mT, last[0])], dim=-1)
        else:
            along_A, along_G = torch.bmm(most, U_A), torch.bmm(U_G.mT, most)
        inner = torch.bmm(along_G, U_A)
        lengths = torch.linalg.vector_norm(along_A, dim=1)
        return cls(inverse, V, along_G, along_A.baddbmm_(inverse.G.left, inner), inner, lengths)

    def product(self) -> Float[Tensor, "1"] | None:
        """Returns <X, V> of a single matrix; None where rounding decides on it. Compares numbers, so only on the host.

        <X, V> = |V|^2 + sum_i c_G,i |P_G,i|^2 + sum_j c_A,j (|P_A,j|^2 + sum_i c_G,i C_ij^2), and all c lie between -1
        and 0: of a result that is small beside |V|^2, only what was rounded is left.
        """
        c_A, c_G = self.inverse.A.weights, self.inverse.G.weights
        assert c_A is not None and c_G is not None, "it is of low rank"
        length = torch.stack([torch.dot(each.view(-1), each.view(-1)) for each in self.V]).sum()
        of_G = torch.linalg.vector_norm(self.along_G, dim=2).square_()
        of_A = self.lengths_A.square() + torch.bmm(c_G.unsqueeze(1), self.inner.square()).squeeze(1)
        found = torch.dot(c_G.view(-1), of_G.view(-1)) + torch.dot(c_A.view(-1), of_A.view(-1)) + length
        lost = float(found) < torch.finfo(found.dtype).eps ** 0.5 * float(length)
        return None if lost else found.view(1)

    def overwrite(self, scale: float) -> None:
        """Makes of V `scale` times X."""
        A, G, _ = self.inverse
        most, *last = self.V
        if last:
            last[0].baddbmm_(G.left, self.along_G[..., -1:], beta=scale, alpha=scale)
            last[0].baddbmm_(self.along_A, A.left[:, -1:].mT, alpha=scale)
        w = most.shape[-1]
        most.baddbmm_(G.left, self.along_G[..., :w], beta=scale, alpha=scale)
        most.baddbmm_(self.along_A, A.left[:, :w].mT, alpha=scale)
