"""Orthonormal bases whose first directions are given: as matrices, or as reflections where the given ones are few.

Schreiber and Van Loan, "A storage-efficient WY representation for products of Householder transformations", 1989.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class OrthonormalBasis(NamedTuple):
    """The columns of a d x d matrix Q with Q^T Q = I, which is given itself, or as Q = I - W Y^T.

    The second form multiplies in 2 r / d of the first one's operations, and has 2 r / d of its numbers.

    Attributes:
        W: Q, or W.
        Y: Y; r is 0 where Q is given itself.
    """

    W: Float[Tensor, "c d k"]
    Y: Float[Tensor, "c d r"]

    @classmethod
    def whole(cls, Q: Float[Tensor, "c d d"]) -> "OrthonormalBasis":
        """Returns the columns of an orthonormal matrix."""
        return cls(Q, Q.new_zeros(len(Q), Q.shape[-1], 0))

    @classmethod
    def completing(cls, vectors: Float[Tensor, "c d r"]) -> "OrthonormalBasis":
        """Returns a basis that begins with some orthonormal columns, up to their signs; the rest are near to axes.

        The factorisation V = Q R by r reflections I - tau y y^T has the columns of V, up to signs, as the first ones of
        Q, for R is triangular and orthonormal. With Y of the y, Q = I - Y T Y^T, where T^-1 is upper triangular: above
        the diagonal it is Y^T Y, on it 1 / tau. W = Y T. However V was rounded, Q is orthonormal but for rounding.

        Args:
            vectors: V, of fewer columns than rows.
        """
        packed, tau = torch.geqrf(vectors)
        r = vectors.shape[-1]
        Y = packed.tril(-1)
        Y.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        used = tau != 0  # what is an axis in its place already isn't reflected
        Y *= used.unsqueeze(-2)
        inverse = (Y.mT @ Y).triu(1)
        inverse.diagonal(dim1=-2, dim2=-1).copy_(torch.where(used, 1.0 / torch.where(used, tau, 1.0), 1.0))
        unit = torch.eye(r, dtype=Y.dtype, device=Y.device)
        T = torch.linalg.solve_triangular(inverse, unit.expand_as(inverse), upper=True)
        return cls(Y @ T, Y)

    @property
    def size(self) -> int:
        """The d."""
        return self.W.shape[-2]

    @property
    def reflected(self) -> bool:
        """Whether Q is given as I - W Y^T."""
        return self.Y.shape[-1] > 0

    def matrix(self) -> Float[Tensor, "c d d"]:
        """Returns Q."""
        unit = torch.eye(self.size, dtype=self.W.dtype, device=self.W.device).expand(len(self.W), -1, -1)
        return self.rotated(unit)

    def rotated(self, X: Float[Tensor, "c n d"], out: Float[Tensor, "c n d"] | None = None) -> Float[Tensor, "c n d"]:
        """Returns X Q: what rows X have for coordinates; in `out`, another tensor than X, if given."""
        if not self.reflected:
            return torch.bmm(X, self.W, out=out)
        return torch.baddbmm(X, torch.bmm(X, self.W), self.Y.mT, alpha=-1, out=out)

    def rotated_back(
        self, X: Float[Tensor, "c n d"], out: Float[Tensor, "c n d"] | None = None
    ) -> Float[Tensor, "c n d"]:
        """Returns X Q^T: the rows with coordinates X; in `out`, another tensor than X, if given."""
        if not self.reflected:
            return torch.bmm(X, self.W.mT, out=out)
        return torch.baddbmm(X, torch.bmm(X, self.Y), self.W.mT, alpha=-1, out=out)

    def columns_rotated(self, X: Float[Tensor, "c d n"]) -> Float[Tensor, "c d n"]:
        """Returns Q^T X: what columns X have for coordinates."""
        if not self.reflected:
            return torch.bmm(self.W.mT, X)
        return torch.baddbmm(X, self.Y, torch.bmm(self.W.mT, X), alpha=-1)

    def columns_rotated_back(self, X: Float[Tensor, "c d n"], scale: float = 1.0) -> Float[Tensor, "c d n"]:
        """Returns `scale` times Q X: the columns with coordinates X."""
        if not self.reflected:
            return torch.baddbmm(X, self.W, X, beta=0, alpha=scale)  # with beta = 0 the first argument isn't read
        return torch.baddbmm(X, self.W, torch.bmm(self.Y.mT, X), beta=scale, alpha=-scale)
