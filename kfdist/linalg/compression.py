"""Sums of outer products rewritten with fewer terms (algorithms.md 6.3)."""

import torch
from jaxtyping import Float
from torch import Tensor


def compress_columns(
    a: Float[Tensor, "*n t q"], g: Float[Tensor, "*n t p"], columns: int, *, iterations: int = 4
) -> tuple[Float[Tensor, "*n r q"], Float[Tensor, "*n r p"]]:
    """Rewrites each sum_t g_t a_t^T, a p x q matrix, with at most `columns` columns, without a host sync.

    Exact where t, p or q is no more than `columns`. Else M = sum_t g_t a_t^T is projected on a basis B of its leading
    singular vectors, on its shorter side: M ~ B (B^T M). The basis is found by block power iteration with the columns
    alone. A library's singular value decomposition would make the host wait, and a t x t matrix per example wouldn't
    fit: an early layer of an image network has thousands of positions. The error is that of the truncated
    decomposition where the spectrum has a gap, and within a few per cent of it elsewhere.

    The new columns stand for the sum alone: sums of a a^T and g g^T can't be computed of them any more.

    Args:
        a: Columns on the side of the inputs.
        g: Columns on the side of the outputs.
        columns: kappa, at least 1.
        iterations: Further multiplications of the basis by M M^T.

    Returns:
        The new a and g: r = t, unchanged, where t <= kappa; else min(kappa, p, q).
    """
    t, q, p = a.shape[-2], a.shape[-1], g.shape[-1]
    if t <= columns:
        return a, g
    if p > q:
        g, a = compress_columns(g, a, columns, iterations=iterations)
        return a, g
    if p <= columns:
        unit = torch.eye(p, dtype=g.dtype, device=g.device).expand(*g.shape[:-2], p, p)
        return g.mT @ a, unit
    generator = torch.Generator(device="cpu").manual_seed(0)
    basis = torch.randn((p, columns), generator=generator, dtype=torch.float64)
    basis = basis.to(g.device, g.dtype, non_blocking=True)
    for _ in range(1 + iterations):
        # Orthogonalised each time: without that, small directions drown in float32.
        basis = torch.linalg.qr(g.mT @ (a @ (a.mT @ (g @ basis)))).Q
    return (g @ basis).mT @ a, basis.mT
