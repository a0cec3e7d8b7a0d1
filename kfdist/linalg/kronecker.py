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


def solve_factored(
    A: Spectrum,
    G: Spectrum,
    damping_A: Float[Tensor, "*c"],
    damping_G: Float[Tensor, "*c"],
    gradient: Float[Tensor, "*c p q"],
) -> Float[Tensor, "*c p q"]:
    """Computes (G + lambda_G I)^{-1} V (A + lambda_A I)^{-1} for positive lambda_A and lambda_G."""
    return solve_left(A, damping_A, solve_left(G, damping_G, gradient).mT).mT


def solve_joint(A: Spectrum, G: Spectrum, damping: float, gradient: Float[Tensor, "*c p q"]) -> Float[Tensor, "*c p q"]:
    """Computes the V' with G V' A + lambda V' = V: exact damping of the product's eigenvalues (algorithms.md 1.1).

    The eigenvalues of the product are w_G w_A on the kept pairs, w_G tail_A and tail_G w_A where one side is outside
    its basis, and tail_G tail_A where both are. A complete basis has no outside. lambda is positive.
    """
    w_A, w_G = A.values.unsqueeze(-2), G.values.unsqueeze(-1)
    tail_A, tail_G = A.tail[..., None, None], G.tail[..., None, None]
    both = 1 / (w_G * w_A + damping)
    if A.complete:
        coordinates = gradient @ A.vectors
        inner = G.vectors.mT @ coordinates
        if G.complete:
            return G.vectors @ (both * inner) @ A.vectors.mT
        outside_G = 1 / (tail_G * w_A + damping)
        return (outside_G * coordinates + G.vectors @ ((both - outside_G) * inner)) @ A.vectors.mT
    coordinates = G.vectors.mT @ gradient
    inner = coordinates @ A.vectors
    outside_A = 1 / (w_G * tail_A + damping)
    if G.complete:
        return G.vectors @ (outside_A * coordinates + ((both - outside_A) * inner) @ A.vectors.mT)
    outside_G = 1 / (tail_G * w_A + damping)
    neither = 1 / (tail_G * tail_A + damping)
    along_A = ((gradient @ A.vectors) * (outside_G - neither)) @ A.vectors.mT
    along_both = ((both - outside_A - outside_G + neither) * inner) @ A.vectors.mT
    return neither * gradient + along_A + G.vectors @ ((outside_A - neither) * coordinates + along_both)
