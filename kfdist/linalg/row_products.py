"""Products with curvature matrices that exist only as rows, and their Gram matrices (algorithms.md 5.1, 6.2, 6.3).

Row i, t holds a layer input a_it of size q and an output gradient g_it of size p; example i's gradient is S_i = sum_t
g_it a_it^T. No function forms a matrix of size q x q, p x p or p q x p q.

Gram matrices are added up in float64 whatever the rows are: they square the condition of their rows, so that half of
the digits would be lost otherwise.
"""

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from kfdist.linalg.psd import symmetrise

CHUNK_NUMBERS = 1 << 22
"""Most numbers that a product holds at once, such as per-example gradients; at least one example's are held."""


def kronecker_product(
    a: Float[Tensor, "c n q"], g: Float[Tensor, "c n p"], V: Float[Tensor, "c p q"]
) -> Float[Tensor, "c p q"]:
    """Computes (g^T g) V (a^T a) in the cheaper order.

    With fewer rows n than max(p, q) by way of the n x n matrix g V a^T, in 2 n p q + 2 n^2 min(p, q) multiplications;
    else as ((g^T (g V)) a^T) a in 4 n p q. The n x n matrix is formed only where it is smaller than the rows
    themselves, so it never has to be cut into chunks.
    """
    n, p, q = a.shape[-2], V.shape[-2], V.shape[-1]
    if n >= max(p, q):
        return (g.mT @ (g @ V)) @ a.mT @ a
    if q <= p:
        return g.mT @ (((g @ V) @ a.mT) @ a)
    return (g.mT @ (g @ (V @ a.mT))) @ a


def fisher_product(
    a: Float[Tensor, "c n t q"], g: Float[Tensor, "c n t p"], V: Float[Tensor, "c p q"]
) -> Float[Tensor, "c p q"]:
    """Computes sum_i <S_i, V> S_i in 2 n t p q multiplications, without forming any S_i."""
    rows_a, rows_g = a.flatten(1, 2), g.flatten(1, 2)
    # The narrower side is the one that is multiplied row by row.
    projected, narrow = (rows_g @ V, a) if V.shape[-1] <= V.shape[-2] else (rows_a @ V.mT, g)
    weights = (projected.view_as(narrow) * narrow).sum((-2, -1), keepdim=True)
    weighted = (weights * narrow).flatten(1, 2)
    return rows_g.mT @ weighted if narrow is a else weighted.mT @ rows_a


def fisher_diagonal(a: Float[Tensor, "c n t q"], g: Float[Tensor, "c n t p"]) -> Float[Tensor, "c p q"]:
    """Computes sum_i S_i^2, squared entry by entry: the diagonal of sum_i vec(S_i) vec(S_i)^T."""
    c, n, t, q = a.shape
    p = g.shape[-1]
    if t == 1:
        return g.squeeze(2).square().mT @ a.squeeze(2).square()
    total = torch.zeros(c, p, q, dtype=a.dtype, device=a.device)
    chunk = max(1, CHUNK_NUMBERS // (c * p * q))
    for first in range(0, n, chunk):
        part = slice(first, first + chunk)
        total += (g[:, part].mT @ a[:, part]).square_().sum(1)
    return total


def fisher_trace(a: Float[Tensor, "c n t q"], g: Float[Tensor, "c n t p"]) -> Float[Tensor, " c"]:
    """Computes sum_i ||S_i||^2, Frobenius, the trace of sum_i vec(S_i) vec(S_i)^T."""
    if a.shape[2] == 1:
        return (a.square().sum(-1) * g.square().sum(-1)).sum((1, 2))
    return fisher_diagonal(a, g).sum((-2, -1))


def keep_rows(rows: Float[Tensor, "c n t d"], used: Bool[Tensor, " n"]) -> Float[Tensor, "c n t d"]:
    """Sets the rows of unused examples to 0, whatever is in them."""
    return torch.where(used[:, None, None], rows, rows.new_zeros(()))


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
    drawn = torch.randperm(size, generator=generator, device="cpu")
    return torch.cat([drawn[:kept].sort().values, drawn[kept:].sort().values]).to(device)


def gram(rows: Float[Tensor, "c n d"]) -> Float64[Tensor, "c n n"]:
    """Returns U U^T for rows U, exactly symmetric."""
    c, n, _ = rows.shape
    total = rows.new_zeros(c, n, n, dtype=torch.float64)
    for part in rows.split(max(1, CHUNK_NUMBERS // max(1, c * n)), -1):
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
    examples = max(1, CHUNK_NUMBERS // max(1, c * t * n * t))
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
