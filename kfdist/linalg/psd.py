"""Symmetric positive semi-definite matrices: packing, checking, factorising.

Matrices may have leading batch dimensions, `*c`. Functions are pure and keep dtype and device.
"""

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

_BLOCK = 512
"""Rows and columns of the blocks in which matrices are mirrored, packed and compared, so that no second one is made."""


def symmetrise(matrix: Float[Tensor, "*c d d"]) -> Float[Tensor, "*c d d"]:
    """Returns (M + M^T)/2, exactly symmetric."""
    return (matrix + matrix.mT) / 2


def trace(matrix: Float[Tensor, "*c d d"]) -> Float[Tensor, "*c"]:
    """Returns the traces."""
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def pack_triangle(matrix: Num[Tensor, "*c d d"], *, out: Num[Tensor, "*c t"] | None = None) -> Num[Tensor, "*c t"]:
    """Packs the lower triangles of symmetric matrices, diagonal included, into half the space.

    The layout is LAPACK's rectangular full packed idea: the triangle of the last columns is folded into the corner that
    the triangle of the first ones leaves empty. It takes no memory beside the result, no index tensors and no host
    sync, which an index of d (d + 1)/2 positions would.

    Args:
        matrix: Only its lower triangle is read.
        out: Where the result goes, contiguous; None for a fresh tensor.

    Returns:
        t = d (d + 1)/2 numbers of each, contiguous.
    """
    d = matrix.shape[-1]
    half = (d + 1) // 2
    rows, offset = _rectangle(d)
    packed = matrix.new_empty(*matrix.shape[:-2], rows * half) if out is None else out
    rectangle = packed.unflatten(-1, (rows, half))
    rectangle[..., rows - d :, :] = matrix[..., :half]
    folded, corner = rectangle[..., : d - half, offset:], matrix[..., half:, half:].mT
    for begin, end in _blocks(d - half):
        diagonal = folded[..., begin:end, begin:end]
        diagonal.copy_(diagonal.tril(-1) + corner[..., begin:end, begin:end].triu())
        folded[..., begin:end, end:] = corner[..., begin:end, end:]
    return packed


def unpack_triangle(packed: Num[Tensor, "*c t"]) -> Num[Tensor, "*c d d"]:
    """Returns the matrices that `pack_triangle` packed, exactly symmetric, in a fresh contiguous tensor.

    Raises:
        ValueError: t isn't d (d + 1)/2 for any d.
    """
    d = triangle_dimension(packed.shape[-1])
    half = (d + 1) // 2
    rows, offset = _rectangle(d)
    rectangle = packed.unflatten(-1, (rows, half))
    matrix = packed.new_empty(*packed.shape[:-1], d, d)
    matrix[..., :half] = rectangle[..., rows - d :, :]
    _mirror(matrix, columns=half)
    folded, corner = rectangle[..., : d - half, offset:], matrix[..., half:, half:]
    for begin, end in _blocks(d - half):
        diagonal = folded[..., begin:end, begin:end]
        corner[..., begin:end, begin:end] = diagonal.triu() + diagonal.triu(1).mT
        for start, stop in _blocks(d - half, end):
            corner[..., begin:end, start:stop] = folded[..., begin:end, start:stop]
            corner[..., start:stop, begin:end] = folded[..., begin:end, start:stop].mT
    return matrix


def mirror_lower_(matrix: Num[Tensor, "*c d d"]) -> Num[Tensor, "*c d d"]:
    """Overwrites the upper triangles with the lower ones, in place, and returns the matrices."""
    _mirror(matrix, columns=matrix.shape[-1])
    return matrix


def _mirror(matrix: Num[Tensor, "*c d d"], *, columns: int) -> None:
    """Overwrites what is above the diagonal with what is below it in the first columns, a square at a time.

    A square fits into a core's cache, and is read and written along rows; a strip of the matrix isn't.
    """
    for begin, end in _blocks(columns):
        diagonal = matrix[..., begin:end, begin:end]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).mT)
        for start, stop in _blocks(matrix.shape[-1], end):
            matrix[..., begin:end, start:stop] = matrix[..., start:stop, begin:end].mT


def _blocks(d: int, first: int = 0) -> list[tuple[int, int]]:
    return [(begin, min(begin + _BLOCK, d)) for begin in range(first, d, _BLOCK)]


def sum_of_products(rows: Float[Tensor, "*c r d"]) -> Float[Tensor, "*c d d"]:
    """Returns rows^T rows, exactly symmetric; columns that are zero take neither time nor, untouched, memory."""
    used = (rows != 0).flatten(end_dim=-2).any(0)
    places = used.nonzero().squeeze(-1)
    if 2 * len(places) > len(used):
        return mirror_lower_(rows.mT @ rows)
    total = rows.new_zeros(*rows.shape[:-2], len(used), len(used))
    some = rows[..., places]
    total[..., places.unsqueeze(-1), places] = mirror_lower_(some.mT @ some)
    return total


def triangle_size(d: int) -> int:
    """Returns how many numbers the triangle of a d x d matrix has."""
    return d * (d + 1) // 2


def triangle_dimension(size: int) -> int:
    """Returns the d with d (d + 1)/2 = `size`.

    Raises:
        ValueError: There is none.
    """
    d = int((2 * size) ** 0.5)
    for candidate in (d - 1, d, d + 1):
        if candidate >= 0 and triangle_size(candidate) == size:
            return candidate
    raise ValueError(f"{size} numbers are no triangle: d (d + 1)/2 is {triangle_size(d)} for d = {d}")


def _rectangle(d: int) -> tuple[int, int]:
    """Returns the rows of the packed rectangle and the column at which the folded triangle starts."""
    return (d + 1, 0) if d % 2 == 0 else (d, 1)


def damped_cholesky_inverse(
    matrix: Float[Tensor, "*c d d"], damping: Float[Tensor, "*c"]
) -> tuple[Float[Tensor, "*c d d"], Bool[Tensor, "*c"]]:
    """Computes (M + damping I)^{-1} of symmetric M by Cholesky factorisation.

    Returns:
        The inverse, exactly symmetric, and whether M + damping I was positive definite in this precision; where it
        wasn't, the inverse means nothing.
    """
    damped = matrix.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
    factor, info = torch.linalg.cholesky_ex(damped)  # reads the lower triangle
    del damped
    return mirror_lower_(torch.cholesky_inverse(factor)), info == 0


def eigh_descending(matrix: Float[Tensor, "*c d d"]) -> tuple[Float[Tensor, "*c d"], Float[Tensor, "*c d d"]]:
    """Computes the eigendecomposition M = Q diag(d) Q^T of symmetric M with the largest eigenvalue first.

    Args:
        matrix: Only its lower triangle is read.

    Returns:
        Eigenvalues, not clamped, and eigenvectors in columns.

    Raises:
        torch.linalg.LinAlgError: LAPACK's iteration didn't converge.
    """
    values, vectors = torch.linalg.eigh(matrix)  # reads the lower triangle
    vectors = vectors.flip(-1)  # by its name again, so that the first is gone before it is laid out row by row
    return values.flip(-1), vectors.contiguous()


def asymmetry(matrix: Float[Tensor, "*c d d"]) -> Float[Tensor, "*c"]:
    """Returns max |M - M^T| / max |M| of each matrix, 0 for the zero matrix; takes no memory of the matrix's size."""
    largest, difference = (matrix.new_zeros(matrix.shape[:-2]) for _ in range(2))
    for begin, end in _blocks(matrix.shape[-1]):
        for start, stop in _blocks(matrix.shape[-1], begin):
            below, right = matrix[..., start:stop, begin:end], matrix[..., begin:end, start:stop].mT
            difference = torch.maximum(difference, (below - right).abs().amax((-2, -1)))
            for part in (below, right) if start > begin else (below,):
                largest = torch.maximum(largest, torch.maximum(part.amax((-2, -1)), -part.amin((-2, -1))))
    return torch.where(largest > 0, difference / largest, torch.zeros_like(largest))


def inverse_residual(
    matrix: Float[Tensor, "*c d d"],
    damping: Float[Tensor, "*c"],
    inverse: Float[Tensor, "*c d d"],
    probes: Float[Tensor, "*c d k"],
) -> Float[Tensor, "*c"]:
    """Estimates how far an inverse X is from (M + damping I)^{-1}: ||(M + damping I) X Z - Z|| / ||Z||, Frobenius.

    Z are Gaussian columns, the probes: a few matrix-vector products, where forming (M + damping I) X would cost as much
    as the inverse.
    """
    solution = inverse @ probes
    difference = matrix @ solution + damping[..., None, None] * solution - probes
    return _norm(difference) / _norm(probes)


def eigen_residual(
    matrix: Float[Tensor, "*c d d"],
    values: Float[Tensor, "*c r"],
    vectors: Float[Tensor, "*c d r"],
    probes: Float[Tensor, "*c d k"],
) -> Float[Tensor, "*c"]:
    """Estimates ||(M - U diag(w) U^T) Z|| / ||M Z||, Frobenius: the error of a decomposition, full or low-rank.

    M is symmetric. Z are Gaussian columns, the probes. For the zero matrix it is the size of the difference.
    """
    product = (probes.mT @ matrix).mT  # narrow on the left: matrices of rows are read as they lie
    difference = product - vectors @ (values.unsqueeze(-1) * (probes.mT @ vectors).mT)
    size = _norm(product)
    return torch.where(size > 0, _norm(difference) / size, _norm(difference))


def orthogonality_residual(vectors: Float[Tensor, "*c d r"], probes: Float[Tensor, "*c r k"]) -> Float[Tensor, "*c"]:
    """Estimates how far U^T U is from I: ||U^T U Z - Z|| / ||Z||, Frobenius, for Gaussian probes Z."""
    return _norm(((vectors @ probes).mT @ vectors).mT - probes) / _norm(probes)


def largest_eigenvalue(
    matrix: Float[Tensor, "*c d d"], start: Float[Tensor, "*c d 1"], *, iterations: int = 8
) -> Float[Tensor, "*c"]:
    """Estimates the largest eigenvalue of a positive semi-definite matrix from below, by power iteration."""
    vector, size = start / _norm(start)[..., None, None], _norm(start)
    for _ in range(iterations):
        vector = matrix @ vector
        size = _norm(vector)
        vector = vector / size.clamp_min(torch.finfo(matrix.dtype).tiny)[..., None, None]
    return size


def _norm(matrix: Float[Tensor, "*c d k"]) -> Float[Tensor, "*c"]:
    return torch.linalg.matrix_norm(matrix)
