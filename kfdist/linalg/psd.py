"""Symmetric positive semi-definite matrices: packing, checking, factorising.

All matrices carry leading batch dimensions: `[..., d, d]`. Functions are pure and keep dtype and device.
"""

import torch
from torch import Tensor


def symmetrise(matrix: Tensor) -> Tensor:
    """Returns (M + M^T)/2, exactly symmetric.

    Args:
        matrix: `[..., d, d]`.
    """
    return (matrix + matrix.mT) / 2


def trace(matrix: Tensor) -> Tensor:
    """Returns the traces of `[..., d, d]` as `[...]`."""
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def pack_triangle(matrix: Tensor) -> Tensor:
    """Packs the lower triangles of symmetric matrices, diagonal included, into half the space.

    The layout is LAPACK's rectangular full packed idea: the triangle of the last columns is folded into the corner that
    the triangle of the first ones leaves empty. It takes a few whole-matrix copies, no index tensors and no host sync,
    which an index of d (d + 1)/2 positions would.

    Args:
        matrix: `[..., d, d]`; only the lower triangle is read.

    Returns:
        `[..., d (d + 1)/2]`, a fresh contiguous tensor.
    """
    d = matrix.shape[-1]
    half = (d + 1) // 2
    rows, offset = _rectangle(d)
    rectangle = matrix.new_zeros(*matrix.shape[:-2], rows, half)
    rectangle[..., rows - d :, :] = matrix[..., :half].tril()
    corner = matrix[..., half:, half:].mT.triu()
    rectangle[..., : d - half, offset:] += corner
    return rectangle.flatten(-2)


def unpack_triangle(packed: Tensor) -> Tensor:
    """Returns the symmetric matrices that `pack_triangle` packed.

    Args:
        packed: `[..., d (d + 1)/2]`.

    Returns:
        `[..., d, d]`, a fresh contiguous tensor, exactly symmetric.

    Raises:
        ValueError: The last dimension isn't d (d + 1)/2 for any d.
    """
    d = triangle_dimension(packed.shape[-1])
    half = (d + 1) // 2
    rows, offset = _rectangle(d)
    rectangle = packed.unflatten(-1, (rows, half))
    matrix = packed.new_zeros(*packed.shape[:-1], d, d)
    matrix[..., :half] = rectangle[..., rows - d :, :].tril()
    matrix[..., half:, half:] = rectangle[..., : d - half, offset:].triu().mT
    matrix += matrix.tril(-1).mT
    return matrix


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


def damped_cholesky_inverse(matrix: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Computes (M + damping I)^{-1} by Cholesky factorisation.

    Args:
        matrix: Symmetric `[..., d, d]`.
        damping: `[...]`, one value per matrix.

    Returns:
        The inverse `[..., d, d]`, exactly symmetric, and whether each matrix was positive definite in this precision,
        `[...]` of bool. Where it wasn't, the inverse means nothing.
    """
    damped = symmetrise(matrix)
    damped.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
    factor, info = torch.linalg.cholesky_ex(damped)
    return symmetrise(torch.cholesky_inverse(factor)), info == 0


def eigh_descending(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the eigendecomposition M = Q diag(d) Q^T with the largest eigenvalue first.

    Args:
        matrix: Symmetric `[..., d, d]`.

    Returns:
        Eigenvalues `[..., d]`, not clamped, and eigenvectors `[..., d, d]` in columns.

    Raises:
        torch.linalg.LinAlgError: LAPACK's iteration didn't converge.
    """
    values, vectors = torch.linalg.eigh(symmetrise(matrix))
    return values.flip(-1), vectors.flip(-1).contiguous()


def asymmetry(matrix: Tensor) -> Tensor:
    """Returns max |M - M^T| / max |M| of each matrix, 0 for the zero matrix, as `[...]`."""
    largest = matrix.abs().amax((-2, -1))
    difference = (matrix - matrix.mT).abs().amax((-2, -1))
    return torch.where(largest > 0, difference / largest, torch.zeros_like(largest))


def inverse_residual(matrix: Tensor, damping: Tensor, inverse: Tensor, probes: Tensor) -> Tensor:
    """Estimates how far `inverse` is from (M + damping I)^{-1}: ||(M + damping I) X Z - Z|| / ||Z||, Frobenius.

    Costs a few matrix-vector products, where forming (M + damping I) X would cost as much as the inverse.

    Args:
        matrix: Symmetric `[..., d, d]`.
        damping: `[...]`.
        inverse: X, `[..., d, d]`.
        probes: Gaussian columns Z, `[..., d, k]`.

    Returns:
        `[...]`.
    """
    solution = inverse @ probes
    difference = matrix @ solution + damping[..., None, None] * solution - probes
    return _norm(difference) / _norm(probes)


def eigen_residual(matrix: Tensor, values: Tensor, vectors: Tensor, probes: Tensor) -> Tensor:
    """Estimates ||(M - U diag(w) U^T) Z|| / ||M Z||, Frobenius: the error of a decomposition, full or low-rank.

    Args:
        matrix: Symmetric `[..., d, d]`.
        values: w, `[..., r]`.
        vectors: U, `[..., d, r]`.
        probes: Gaussian columns Z, `[..., d, k]`.

    Returns:
        `[...]`; 0 for the zero matrix.
    """
    product = matrix @ probes
    difference = product - vectors @ (values.unsqueeze(-1) * (vectors.mT @ probes))
    size = _norm(product)
    return torch.where(size > 0, _norm(difference) / size, _norm(difference))


def orthogonality_residual(vectors: Tensor, probes: Tensor) -> Tensor:
    """Estimates how far U^T U is from I: ||U^T U Z - Z|| / ||Z||, Frobenius.

    Args:
        vectors: U, `[..., d, r]`.
        probes: Gaussian columns Z, `[..., r, k]`.

    Returns:
        `[...]`.
    """
    return _norm(vectors.mT @ (vectors @ probes) - probes) / _norm(probes)


def largest_eigenvalue(matrix: Tensor, start: Tensor, *, iterations: int = 8) -> Tensor:
    """Estimates the largest eigenvalue from below, by power iteration.

    Args:
        matrix: Symmetric positive semi-definite `[..., d, d]`.
        start: `[..., d, 1]`, not zero.
        iterations: Multiplications by the matrix.

    Returns:
        `[...]`.
    """
    vector, size = start / _norm(start)[..., None, None], _norm(start)
    for _ in range(iterations):
        vector = matrix @ vector
        size = _norm(vector)
        vector = vector / size.clamp_min(torch.finfo(matrix.dtype).tiny)[..., None, None]
    return size


def _norm(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix)
