"""Randomised low-rank decompositions: of positive semi-definite matrices, and of sums of outer products.

algorithms.md 3.2 and 6.3; Halko, Martinsson, Tropp, "Finding structure with randomness", 2011; Puiu, arXiv 2206.15397.
Eigenvalues are always in descending order.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from kfdist.linalg.gram import LOSS_TOLERANCE, Triangle, cholesky, gram, products_are_exact
from kfdist.linalg.psd import eigh_descending, symmetrise
from kfdist.linalg.uploads import sent

SKETCH_NUMBERS = 1 << 22
"""Random numbers that a sketch of rows holds at a time (32 MiB in float64)."""

PAIRED = 4
"""Power iterations from which on two of them are saved: with fewer, as many are better (docs/performance.md)."""

_INTERIM_TOLERANCE = 1e5
"""`LOSS_TOLERANCE` of a basis that is multiplied again: its span matters, and rounding of the product has cost that as
much already."""

_ROUNDING = 4
"""Eigenvalues, in units of rounding of the largest, that are none: sums of products leave less than one."""

_SPARE = 16
"""Rows that a submatrix has more than the largest rank that it is to tell."""

_DRAWN = 1 << 16
"""Random numbers of a test matrix that are drawn at a time."""


def gaussian_sketch(matrix: Float[Tensor, "*c d k"], width: int, *, seed: int) -> Float[Tensor, "*c d {width}"]:
    """Draws the Gaussian test matrix for `matrix`, the same on every device and in every precision.

    Args:
        matrix: Gives shape, dtype and device.
        width: Number of columns s.
        seed: The only source of randomness.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    sketch = matrix.new_empty(*matrix.shape[:-1], width)
    # Always drawn in float64 on the CPU: a repetition in higher precision then sees the same sketch.
    for some in sketch.view(-1).split(_DRAWN):
        some.copy_(torch.randn(some.shape, generator=generator, dtype=torch.float64, device="cpu"))
    return sketch


def sketch_rows(rows: Float[Tensor, "c n d"], size: int, *, seed: int) -> Float[Tensor, "c {size} d"]:
    """Compresses rows to `size` random combinations: O^T rows / sqrt(size) for a Gaussian O, `[n, size]`.

    E[sketch^T sketch] = rows^T rows, since E[O O^T] = size I; an entry's standard deviation is at most
    sqrt(2/size) times the geometric mean of its two diagonal entries. Linear in the rows: where ranks sketch their own
    rows, each with a different seed, the sum of the sketches is a sketch of the union of the rows.

    Args:
        rows: n may be 0.
        size: Rows of the sketch.
        seed: The only source of randomness. Devices of one kind draw alike; in float32 and float64 the CPU does.
    """
    c, n, d = rows.shape
    total = rows.new_zeros(c, size, d)
    on_host = rows.device.type in ("cpu", "meta")  # which has no generator
    device = torch.device("cpu") if on_host else rows.device
    generator = torch.Generator(device=device).manual_seed(seed)
    for some in rows.split(max(1, SKETCH_NUMBERS // max(1, c * size)), dim=1):
        shape = (c, some.shape[1], size)
        # The rows of a batch of sequences are many: drawn on the CPU the host would fall behind an accelerator, and it
        # would wait for the copy. Only the rank that has the rows draws for them, so ranks need not draw alike.
        dtype = torch.float64 if on_host else rows.dtype
        drawn = torch.randn(shape, generator=generator, dtype=dtype, device=device)
        total.baddbmm_(drawn.to(rows).mT, some)  # in place: autocast leaves such products alone
    return total.div_(size**0.5)


def numerical_rank(matrix: Float[Tensor, "*c d d"], places: Int64[Tensor, " m"], *, most: int) -> int | None:
    """Counts the dimensions of the range of a positive semi-definite matrix, but for rounding, if they are few.

    It looks at a submatrix alone, of `most` rows and columns and a few more, evenly spaced. Of a matrix of that rank
    or less it is singular; where its rank is the matrix's, as that of all but special rows is, that is the answer.
    It may be too small, so whoever relies on it checks what he makes of it. Waits for the matrix.

    Args:
        matrix: M.
        places: Rows that are looked at, in order: those that aren't zero.
        most: Rank from which on the answer is None; small beside d.
    """
    m = min(most + _SPARE, len(places))
    if not m:
        return None
    some = places[torch.arange(m, device=places.device) * len(places) // m]
    part = matrix[..., some.unsqueeze(-1), some].double()
    lower, info = torch.linalg.cholesky_ex(part)
    least = _ROUNDING * torch.finfo(matrix.dtype).eps
    diagonal = part.diagonal(dim1=-2, dim2=-1).amax(-1)
    pivots = lower.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    if not bool(((info > 0) | (pivots <= least * diagonal)).all()):
        return None  # at a third of m^3 operations, of what costs ten thousand times as many
    values = torch.linalg.eigvalsh(part)
    found = int((values > least * values[..., -1:]).sum(-1).max())
    return found if found <= most else None


def range_basis(
    matrix: Float[Tensor, "*c d d"], sketch: Float[Tensor, "*c d s"], *, power_iterations: int
) -> tuple[Float[Tensor, "*c d s"], Float[Tensor, "*c d s"]]:
    """Finds an orthonormal basis Q that nearly spans the dominant eigenvectors of `matrix`, M.

    The basis is orthogonalised after every multiplication: without that, small modes drown in float32. Each of the
    `power_iterations`, further multiplications by the symmetric matrix, sharpens the decay of the spectrum.

    From `PAIRED` power iterations on, two fewer multiplications are as good: the last two bases span 2 s dimensions, of
    which the Rayleigh-Ritz procedure takes the s best (a block Krylov space of two blocks; Musco and Musco, 2015).

    Args:
        matrix: M.
        sketch: Where it begins, Gaussian or known directions; let go of.
        power_iterations: n_p.

    Returns:
        Q and M Q.
    """
    paired = power_iterations >= PAIRED and 2 * sketch.shape[-1] <= matrix.shape[-1]
    for left in reversed(range(power_iterations - 2 if paired else 1 + power_iterations)):
        tolerance = _INTERIM_TOLERANCE if left else LOSS_TOLERANCE
        sketch, _ = _orthonormalised(_product(matrix, sketch), tolerance)
    image = _product(matrix, sketch)
    return _best_of_two(matrix, sketch, image) if paired else (sketch, image)


def _best_of_two(
    matrix: Float[Tensor, "*c d d"], basis: Float[Tensor, "*c d s"], image: Float[Tensor, "*c d s"]
) -> tuple[Float[Tensor, "*c d s"], Float[Tensor, "*c d s"]]:
    """Returns an orthonormal basis of the s dimensions of span [Q, M Q] in which M is largest, and M times it."""
    corner = basis.mT @ image
    following = _complement(basis, image - (corner.mT @ basis.mT).mT)
    beyond = _product(matrix, following)
    coupling = following.mT @ image
    small = torch.cat([torch.cat([corner, coupling.mT], -1), torch.cat([coupling, following.mT @ beyond], -1)], -2)
    values, Z = eigh_descending(symmetrise(small))
    # By magnitude: a large negative eigenvalue, which no factor should have, must not be overlooked.
    order = values.abs().argsort(dim=-1, descending=True, stable=True)[..., : basis.shape[-1]]
    X, Y = Z.gather(-1, order.unsqueeze(-2).expand(*Z.shape[:-1], basis.shape[-1])).chunk(2, dim=-2)
    chosen = (X.mT @ basis.mT).add_(Y.mT @ following.mT)
    del basis, following
    return chosen.mT, (X.mT @ image.mT).add_(Y.mT @ beyond.mT).mT


def _complement(basis: Float[Tensor, "*c d s"], columns: Float[Tensor, "*c d s"]) -> Float[Tensor, "*c d s"]:
    """Returns an orthonormal basis of the columns, orthogonal to another one, to which they are but for rounding.

    Where nothing is left of a spectrum that falls off, the columns are rounding: any directions will do, but they are
    made orthogonal to the basis once more, since rounding doesn't know it.
    """
    triangle = _triangle(columns, _INTERIM_TOLERANCE)
    if triangle is not None:
        columns = _solved(columns, triangle.inverse)
        columns = columns - ((columns.mT @ basis) @ basis.mT).mT
        triangle = _triangle(columns, LOSS_TOLERANCE)
        if triangle is not None:
            return _solved(columns, triangle.inverse)
    # Householder reflections of both leave dependent columns no place within the basis.
    return torch.linalg.qr(torch.cat([basis, columns], -1)).Q[..., basis.shape[-1] :]


def _product(matrix: Float[Tensor, "*c d d"], columns: Float[Tensor, "*c d s"]) -> Float[Tensor, "*c d s"]:
    """Multiplies a symmetric matrix onto columns; the product is column-major, as LAPACK wants it."""
    return (columns.mT @ matrix).mT


def _triangle(columns: Float[Tensor, "*c d s"], tolerance: float) -> Triangle | None:
    """Returns by what the columns become orthonormal; None where that loses more than the tolerance."""
    triangle = cholesky(gram(columns)) if products_are_exact(columns.device) else None
    return triangle if triangle is not None and triangle.loses_at_most(tolerance, columns.dtype) else None


def _solved(columns: Float[Tensor, "*c d s"], inverse: Float[Tensor, "*c s s"]) -> Float[Tensor, "*c d s"]:
    """Returns E R^{-1}, column-major."""
    return (inverse.to(columns).mT @ columns.mT).mT


def _orthonormalised(
    columns: Float[Tensor, "*c d s"], tolerance: float = LOSS_TOLERANCE
) -> tuple[Float[Tensor, "*c d s"], Float[Tensor, "*c s s"]]:
    """Returns Q and R with Q R = columns, s <= d: by products or, where these lose more, by Householder reflections.

    Args:
        columns: Overwritten by reflections, where they are column-major.
        tolerance: Of `Triangle.loses_at_most`.
    """
    triangle = None if columns.dtype == torch.float64 else _triangle(columns, tolerance)  # see `LOSS_TOLERANCE`
    if triangle is not None:
        return _solved(columns, triangle.inverse), triangle.R.to(columns)
    tau = columns.new_empty(*columns.shape[:-2], columns.shape[-1])
    torch.geqrf(columns, out=(columns, tau))
    R = columns[..., : columns.shape[-1], :].triu()
    return torch.linalg.householder_product(columns, tau, out=columns), R


def randomized_svd(
    basis: Float[Tensor, "*c d s"], image: Float[Tensor, "*c d s"]
) -> tuple[Float[Tensor, "*c s"], Float[Tensor, "*c d s"]]:
    """Computes M ~ V diag(w) V^T of symmetric M from B = Q^T M, Q orthonormal, and its right singular vectors V.

    V carries one more multiplication by M than Q does, so it is more accurate than `randomized_eigh` on the same basis.
    B^T = Z R reduces the d x s problem to an s x s one before the singular value decomposition.

    Args:
        basis: Q.
        image: M Q; may be overwritten.

    Returns:
        Eigenvalues w, negative where the matrix is indefinite, descending in magnitude, and V.
    """
    outer, reduced = _orthonormalised(image)
    left, values, right = torch.linalg.svd(reduced)
    # For a symmetric matrix the left singular vectors of B, brought back by Q, equal the right ones up to the sign of
    # the eigenvalue, which singular values don't have.
    overlaps = (left.mT @ (outer.mT @ basis) @ right.mT).diagonal(dim1=-2, dim2=-1)
    del basis
    signs = torch.where(overlaps < 0, -1.0, 1.0).to(values)
    return values * signs, outer @ left


def randomized_eigh(
    basis: Float[Tensor, "*c d s"], image: Float[Tensor, "*c d s"]
) -> tuple[Float[Tensor, "*c s"], Float[Tensor, "*c d s"]]:
    """Computes M ~ U diag(w) U^T of symmetric M from the projection Q^T M Q, Q orthonormal.

    Cheaper than `randomized_svd` but projected on both sides, so less accurate.

    Args:
        basis: Q.
        image: M Q.
    """
    values, rotation = eigh_descending(symmetrise(basis.mT @ image))
    return values, basis @ rotation


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
    basis = torch.randn((p, columns), generator=generator, dtype=torch.float64, device="cpu")
    basis = sent(basis.to(g.dtype), g.device)
    for _ in range(1 + iterations):
        # Orthogonalised each time: without that, small directions drown in float32.
        basis = torch.linalg.qr(g.mT @ (a @ (a.mT @ (g @ basis)))).Q
    return (g @ basis).mT @ a, basis.mT
