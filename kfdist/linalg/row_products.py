"""Products with curvature matrices that exist only as rows (algorithms.md 5.1).

Row i, t holds a layer input a_it of size q and an output gradient g_it of size p; example i's gradient is S_i = sum_t
g_it a_it^T. No function forms a matrix of size q x q, p x p or p q x p q.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

CHUNK_NUMBERS = 1 << 22
"""Most numbers of per-example gradients formed at once (16 MiB in float32); one example is always formed."""


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
