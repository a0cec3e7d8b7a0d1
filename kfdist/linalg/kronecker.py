r"""Damped inverses of Kronecker products, applied to matrices.

Conventions (algorithms.md 0): A is of the layer's inputs, q x q, G of the output gradients, p x p, V is p x q; leading
batch dimensions are `*c`. With row-major flattening, the way tensors lie in memory, `(G (x) A) V.ravel() = (G V
A).ravel()`.

A `Spectrum` stands for the symmetric matrix U diag(w) U^T + tail (I - U U^T).
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

DampingRule = Literal["pi", "relative", "common"]

RELATIVE_FLOOR = 1e-30
"""A largest eigenvalue below this counts as a zero factor: damping relative to it would divide by (almost) zero. Output
gradients late in training have second moments of 1e-12 and less, so the floor lies just above what float32 resolves."""


class Spectrum(NamedTuple):
    """A symmetric d x d matrix by its leading r eigenpairs.

    Attributes:
        vectors: U, orthonormal columns.
        values: w, descending, not negative.
        tail: The eigenvalue of everything orthogonal to U.
    """

    vectors: Float[Tensor, "*c d r"]
    values: Float[Tensor, "*c r"]
    tail: Float[Tensor, "*c"]

    @property
    def complete(self) -> bool:
        """Whether U is square, so that nothing is orthogonal to it."""
        return self.vectors.shape[-2] == self.vectors.shape[-1]


def split_by_trace(
    trace_A: Float[Tensor, "*c"], trace_G: Float[Tensor, "*c"], *, d_in: int, d_out: int, damping: float
) -> tuple[Float[Tensor, "*c"], Float[Tensor, "*c"]]:
    """Splits lambda into factored Tikhonov damping (Martens & Grosse 2015, 6.3; algorithms.md 1.1).

    lambda_A = pi gamma, lambda_G = gamma / pi, gamma = sqrt(lambda), pi = sqrt((tr A / q)/(tr G / p)): of all splits
    with lambda_A lambda_G = lambda, this one minimises the trace norm of the error. pi is 1 where a trace isn't
    positive. The traces are of the undamped factors, of sizes q = `d_in` and p = `d_out`.
    """
    usable = (trace_A > 0) & (trace_G > 0)
    one = torch.ones_like(trace_A)
    # Roots before the quotient: the product of two traces can overflow float32, their roots can't.
    pi = (torch.where(usable, trace_A, one) / d_in).sqrt() / (torch.where(usable, trace_G, one) / d_out).sqrt()
    pi = torch.where(usable, pi, one)
    gamma = damping**0.5
    return pi * gamma, gamma / pi


def split_by_largest(
    largest_A: Float[Tensor, "*c"], largest_G: Float[Tensor, "*c"], *, damping: float
) -> tuple[Float[Tensor, "*c"], Float[Tensor, "*c"]]:
    """Returns the relative damping of the published RS-KFAC runs: lambda_A = phi w_max(A), lambda_G = phi w_max(G).

    Here `damping` is phi, a fraction, not the lambda of F + lambda I. A factor that is zero takes phi as it is.
    """

    def scale(largest: Tensor) -> Tensor:
        return torch.where(largest > RELATIVE_FLOOR, largest, torch.ones_like(largest))

    return damping * scale(largest_A), damping * scale(largest_G)


def solve_left(
    spectrum: Spectrum, damping: Float[Tensor, "*c"], right_side: Float[Tensor, "*c d k"]
) -> Float[Tensor, "*c d k"]:
    """Computes (U diag(w) U^T + tail (I - U U^T) + damping I)^{-1} X for positive damping.

    By U[((w + damping)^{-1} - (tail + damping)^{-1}) * U^T X] + (tail + damping)^{-1} X (algorithms.md 3.3).
    """
    kept = 1 / (spectrum.values + damping.unsqueeze(-1)).unsqueeze(-1)
    projected = spectrum.vectors.mT @ right_side
    if spectrum.complete:  # nothing lies outside U: don't add and subtract it
        return spectrum.vectors @ (kept * projected)
    rest = 1 / (spectrum.tail + damping)[..., None, None]
    return spectrum.vectors @ ((kept - rest) * projected) + rest * right_side


class FactorInverse(NamedTuple):
    """(M + damping I)^{-1} of a `Spectrum` M of which all coefficients are worked out, ready to be multiplied.

    It is `left`, a matrix, where there is no `right`; `left right^T` without a `scale`, where M's basis is complete;
    else scale (I + left right^T).

    Attributes:
        left: `[c, d, d]` or `[c, d, r]`.
        right: U, `[c, d, r]`.
        scale: 1/(tail + damping), `[c]`.
        weights: Where there is a scale, of the columns of `right` in `left`: (tail - w)/(w + damping), `[c, r]`.
        pieces: Views of what is multiplied from the right onto columns of which the last one lies elsewhere: of the
            matrix its four corners, else `right` and `left^T`, each without what belongs to the last one, and that.
    """

    left: Tensor
    right: Tensor | None = None
    scale: Tensor | None = None
    weights: Tensor | None = None
    pieces: tuple[Tensor, ...] = ()

    @classmethod
    def of(
        cls, factor: Spectrum, damping: Float[Tensor, " c"], *, columns: int, steady: bool, transposed: bool = False
    ) -> "FactorInverse":
        """Works it out, as a matrix where that takes fewer operations.

        Multiplying a matrix takes 2 d^2 n operations and U 4 d r n; making the matrix takes 2 d^2 r.

        Args:
            factor: M.
            damping: Positive.
            columns: n, the size of the other side of what it is multiplied onto.
            steady: Whether it is multiplied often enough for the making not to count.
            transposed: Whether the rows of left^T lie one after another in memory, for who multiplies from the right.
        """
        U, w = factor.vectors, factor.values
        d, r = U.shape[-2:]
        dense = d <= 2 * r if steady else columns * (2 * r - d) > d * r
        damped = w + damping.unsqueeze(-1)
        if factor.complete:  # nothing lies outside U: don't add and subtract it
            left = U / damped.unsqueeze(-2)
            return cls._made(left @ U.mT) if dense else cls._made(left, U)
        scale = torch.reciprocal(factor.tail + damping)
        weights = (factor.tail.unsqueeze(-1) - w) / damped
        left = U * weights.unsqueeze(-2)
        if not dense:
            return cls._made(left.mT.contiguous().mT if transposed else left, U, scale, weights)
        matrix = left @ U.mT
        matrix.diagonal(dim1=-2, dim2=-1).add_(1.0)
        return cls._made(matrix.mul_(scale[:, None, None]))

    @classmethod
    def _made(
        cls, left: Tensor, right: Tensor | None = None, scale: Tensor | None = None, weights: Tensor | None = None
    ) -> "FactorInverse":
        """Makes it with its pieces, which a step would otherwise cut anew for every block."""
        if right is None:
            pieces = left[:, :-1, :-1], left[:, -1:, :-1], left[:, :-1, -1:], left[:, -1:, -1:]
        else:
            pieces = right[:, :-1], right[:, -1:], left[:, :-1].mT, left[:, -1:].mT
        return cls(left, right, scale, weights, pieces)

    @staticmethod
    def most_numbers(d: int, r: int) -> int:
        """Returns how many numbers it has beside U, for a steady damping, of a factor of size d with r eigenpairs."""
        return d * d if d <= 2 * r else d * r

    def multiply_left(self, right_side: Float[Tensor, "c d n"], *, overwrite: bool) -> Float[Tensor, "c d n"]:
        """Multiplies it, but for the `scale`, from the left; into the given tensor if it may and can."""
        if self.right is None:
            return torch.bmm(self.left, right_side)
        inner = torch.bmm(self.right.mT, right_side)
        return torch.bmm(self.left, inner) if self.scale is None else _plus(right_side, self.left, inner, overwrite)

    def multiply_right(self, left_side: Float[Tensor, "c n d"], *, overwrite: bool) -> Float[Tensor, "c n d"]:
        """Multiplies it, but for the `scale`, from the right; see `multiply_left`."""
        if self.right is None:
            return torch.bmm(left_side, self.left)
        inner = torch.bmm(left_side, self.right)
        if self.scale is None:
            return torch.bmm(inner, self.left.mT)
        return _plus(left_side, inner, self.left.mT, overwrite)

    def multiply_right_apart(
        self, most: Float[Tensor, "c n w"], last: Float[Tensor, "c n 1"], *, overwrite: bool
    ) -> tuple[Float[Tensor, "c n w"], Float[Tensor, "c n 1"]]:
        """Does what `multiply_right` does where the last column lies elsewhere, and leaves it there."""
        if self.right is None:
            inside, below, beside, corner = self.pieces
            return torch.bmm(most, inside).baddbmm_(last, below), torch.bmm(most, beside).baddbmm_(last, corner)
        of_most, of_last, upper, lowest = self.pieces
        inner = torch.bmm(most, of_most).baddbmm_(last, of_last)
        if self.scale is None:
            return torch.bmm(inner, upper), torch.bmm(inner, lowest)
        return _plus(most, inner, upper, overwrite), _plus(last, inner, lowest, overwrite)


def _plus(sum_: Tensor, left: Tensor, right: Tensor, overwrite: bool) -> Tensor:
    return sum_.baddbmm_(left, right) if overwrite else torch.baddbmm(sum_, left, right)


class FactoredInverse(NamedTuple):
    """V -> (G + lambda_G I)^{-1} V (A + lambda_A I)^{-1}, ready to be multiplied.

    Attributes:
        A: Of A.
        G: Of G.
        scale: The product of their scales, `[c]`; None for 1.
    """

    A: FactorInverse
    G: FactorInverse
    scale: Tensor | None

    @classmethod
    def of(
        cls,
        A: Spectrum,
        G: Spectrum,
        damping_A: Float[Tensor, " c"],
        damping_G: Float[Tensor, " c"],
        *,
        steady: bool = False,
    ) -> "FactoredInverse":
        """Works it out for positive lambda_A and lambda_G; `steady` as in `FactorInverse.of`."""
        p, q = G.vectors.shape[-2], A.vectors.shape[-2]
        of_A = FactorInverse.of(A, damping_A, columns=p, steady=steady, transposed=True)
        of_G = FactorInverse.of(G, damping_G, columns=q, steady=steady)
        if of_A.scale is None or of_G.scale is None:
            return cls(of_A, of_G, of_G.scale if of_A.scale is None else of_A.scale)
        return cls(of_A, of_G, of_A.scale * of_G.scale)

    @property
    def of_low_rank(self) -> bool:
        """Whether both sides are scale (I + left right^T)."""
        return self.A.weights is not None and self.G.weights is not None

    def solve(self, gradient: Float[Tensor, "c p q"]) -> tuple[Float[Tensor, "c p q"], Float[Tensor, " c"] | None]:
        """Returns X and s such that s X is the product; None for 1. One pass over X less than multiplying s onto it."""
        A, G, scale = self
        if A.scale is None:  # what makes a tensor first, then what overwrites it
            return G.multiply_left(A.multiply_right(gradient, overwrite=False), overwrite=True), scale
        return A.multiply_right(G.multiply_left(gradient, overwrite=False), overwrite=True), scale

    def solve_apart(
        self, most: Float[Tensor, "c p w"], last: Float[Tensor, "c p 1"]
    ) -> tuple[Float[Tensor, "c p w"], Float[Tensor, "c p 1"], Float[Tensor, " c"] | None]:
        """Does what `solve` does where the last column lies elsewhere: returns X without it, it, and s."""
        A, G, scale = self
        if A.scale is None:
            most, last = A.multiply_right_apart(most, last, overwrite=False)
            return G.multiply_left(most, overwrite=True), G.multiply_left(last, overwrite=True), scale
        most, last = G.multiply_left(most, overwrite=False), G.multiply_left(last, overwrite=False)
        return *A.multiply_right_apart(most, last, overwrite=True), scale


class JointInverse(NamedTuple):
    """V -> the V' with G V' A + lambda V' = V: exact damping of the product's eigenvalues (algorithms.md 1.1).

    The eigenvalues of the product are w_G w_A on the kept pairs, w_G tail_A and tail_G w_A where one side is outside
    its basis, and tail_G tail_A where both are. A complete basis has no outside.

    Attributes:
        U_A: Eigenvectors of A.
        U_G: Eigenvectors of G.
        both: What U_G^T V U_A is multiplied with, entry by entry, `[c, r_G, r_A]`.
        outside_A: What U_G^T V is multiplied with, `[c, r_G, 1]`; None where A's basis is complete.
        outside_G: What V U_A is multiplied with, `[c, 1, r_A]`; None where G's basis is complete.
        scale: 1/(tail_G tail_A + lambda), `[c]`, of which the others are fractions; None where a basis is complete.
    """

    U_A: Tensor
    U_G: Tensor
    both: Tensor
    outside_A: Tensor | None = None
    outside_G: Tensor | None = None
    scale: Tensor | None = None

    @classmethod
    def of(cls, A: Spectrum, G: Spectrum, damping: float) -> "JointInverse":
        """Works out the coefficients for a positive lambda."""
        w_A, w_G = A.values.unsqueeze(-2), G.values.unsqueeze(-1)
        tail_A, tail_G = A.tail[..., None, None], G.tail[..., None, None]
        at_both, at_A, at_G = w_G * w_A + damping, w_G * tail_A + damping, tail_G * w_A + damping
        if A.complete and G.complete:
            return cls(A.vectors, G.vectors, torch.reciprocal(at_both))
        if A.complete:
            outside = torch.reciprocal(at_G)
            return cls(A.vectors, G.vectors, torch.reciprocal(at_both).sub_(outside), outside_G=outside)
        if G.complete:
            outside = torch.reciprocal(at_A)
            return cls(A.vectors, G.vectors, torch.reciprocal(at_both).sub_(outside), outside_A=outside)
        outside_A, outside_G = tail_A * (tail_G - w_G) / at_A, tail_G * (tail_A - w_A) / at_G
        both = (tail_G * tail_A - w_G * w_A).div_(at_both).sub_(outside_A).sub_(outside_G)
        scale = torch.reciprocal(tail_G * tail_A + damping).flatten()
        return cls(A.vectors, G.vectors, both, outside_A, outside_G, scale)

    def solve(self, gradient: Float[Tensor, "c p q"]) -> tuple[Float[Tensor, "c p q"], Float[Tensor, " c"] | None]:
        """Returns X and s such that s X is V'; None for 1."""
        U_A, U_G = self.U_A, self.U_G
        if self.outside_A is None:
            along_A = gradient @ U_A
            inner = (U_G.mT @ along_A).mul_(self.both)
            along_A = U_G @ inner if self.outside_G is None else along_A.mul_(self.outside_G).baddbmm_(U_G, inner)
            return along_A @ U_A.mT, None
        along_G = U_G.mT @ gradient
        if self.outside_G is None:
            inner = (along_G @ U_A).mul_(self.both)
            return U_G @ along_G.mul_(self.outside_A).baddbmm_(inner, U_A.mT), None
        along_A = gradient @ U_A
        if gradient.shape[-2] <= gradient.shape[-1]:  # by way of the shorter of the two
            inner = (U_G.mT @ along_A).mul_(self.both)
            along_A.mul_(self.outside_G).baddbmm_(U_G, inner)
            along_G.mul_(self.outside_A)
        else:
            inner = (along_G @ U_A).mul_(self.both)
            along_G.mul_(self.outside_A).baddbmm_(inner, U_A.mT)
            along_A.mul_(self.outside_G)
        return torch.baddbmm(gradient, along_A, U_A.mT).baddbmm_(U_G, along_G), self.scale
