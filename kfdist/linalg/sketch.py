"""Gram matrices of sums of outer products, whole or from a uniform sample of their entries (algorithms.md 6.2, 6.3).

A row stands for the p x q matrix sum_t g_t a_t^T, given by its columns a and g. Gram matrices are added up in float64
whatever the rows are: a Gram matrix squares the condition of its rows, so that half of their digits would be lost
otherwise.
"""

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from kfdist.linalg.psd import symmetrise

CHUNK = 1 << 22
"""Numbers that a product holds at a time in float64 (32 MiB)."""


def sampled_first(size: int, kept: int, *, seed: int, device: torch.device) -> Int64[Tensor, " {size}"]:
    """Draws `kept` of `size` indices uniformly without replacement, and lists them before all the others.

    Rows stored in this order have their sample in front: taking it costs no copy.

    Args:
        size: Number of indices.
        kept: Size of the sample.
        seed: The only source of randomness.
        device: Where the result is to be.

    Returns:
        A permutation of 0..size-1, ascending in both parts.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    drawn = torch.randperm(size, generator=generator)
    return torch.cat([drawn[:kept].sort().values, drawn[kept:].sort().values]).to(device)


def gram(rows: Float[Tensor, "c n d"]) -> Float64[Tensor, "c n n"]:
    """Returns U U^T for rows U, exactly symmetric."""
    c, n, _ = rows.shape
    total = rows.new_zeros(c, n, n, dtype=torch.float64)
    for part in rows.split(max(1, CHUNK // max(1, c * n)), -1):
        wide = part.double()
        total += wide @ wide.mT
    return symmetrise(total)


def gram_of_sums(a: Float[Tensor, "c n t q"], g: Float[Tensor, "c n t p"]) -> Float64[Tensor, "c n n"]:
    """Returns K_ij = sum_{s,t} (a_is . a_jt)(g_is . g_jt): the Gram matrix of sums that are never formed.

    The inner product of sum_s g_is a_is^T and sum_t g_jt a_jt^T is the sum of a block of a Hadamard product. The result
    is exactly symmetric.
    """
    c, n, t, _ = a.shape
    every_a, every_g = a.flatten(1, 2).double(), g.flatten(1, 2).double()
    examples = max(1, CHUNK // max(1, c * t * n * t))
    strips: list[Tensor] = []
    for some_a, some_g in zip(a.split(examples, 1), g.split(examples, 1), strict=True):
        product = some_a.flatten(1, 2).double() @ every_a.mT
        product *= some_g.flatten(1, 2).double() @ every_g.mT
        strips.append(product.unflatten(2, (n, t)).sum(3).unflatten(1, (-1, t)).sum(2))
    return symmetrise(torch.cat(strips, 1))


def square_norms(a: Float[Tensor, "c n t q"], g: Float[Tensor, "c n t p"]) -> Float64[Tensor, "c n"]:
    """Returns ||sum_t g_t a_t^T||^2 of each example."""
    each: list[Tensor] = []
    for some_a, some_g in zip(a.unbind(1), g.unbind(1), strict=True):
        wide_a, wide_g = some_a.double(), some_g.double()
        each.append(((wide_a @ wide_a.mT) * (wide_g @ wide_g.mT)).sum((-2, -1)))
    return torch.stack(each, 1)


def whiten_gram(matrix: Float64[Tensor, "c d d"]) -> tuple[Float64[Tensor, "c r"], Float64[Tensor, "c d r"]]:
    """Decomposes a Gram matrix U U^T = Q diag(w) Q^T; the rows of Z^T U with Z = Q diag(w)^{-1/2} are orthonormal.

    Pairs below the rounding of the decomposition, d eps w_max, are dropped: U has nothing but noise there. Waits for
    the values.

    Args:
        matrix: Symmetric positive semi-definite.

    Returns:
        Eigenvalues w, descending, and Z; r is the largest rank among the c, and what a matrix lacks of it is filled
        with zeros.

    Raises:
        torch.linalg.LinAlgError: LAPACK's iteration didn't converge.
    """
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(-1), vectors.flip(-1)
    floor = matrix.shape[-1] * torch.finfo(matrix.dtype).eps * values[:, :1].clamp_min(0)
    kept = values > floor
    rank = int(kept.sum(-1).max())
    values = torch.where(kept, values, 0.0)[:, :rank]
    scales = torch.where(kept, values.new_ones(()), 0.0)[:, :rank] / torch.where(values > 0, values, 1.0).sqrt()
    return values.contiguous(), vectors[..., :rank] * scales.unsqueeze(-2)
