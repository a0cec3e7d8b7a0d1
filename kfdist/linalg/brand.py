"""Low-rank eigendecompositions that follow a moving average by its rows (algorithms.md 4).

Brand, "Fast low-rank modifications of the thin singular value decomposition", 2006; Puiu, arXiv 2210.08494. U has
orthonormal columns, w is descending and not negative. No function forms a d x d matrix, and the cost of all but
`light_correction` grows linearly with d.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from kfdist.linalg.gram import LOSS_TOLERANCE, Triangle, cholesky, gram, products_are_exact
from kfdist.linalg.kronecker import Spectrum, solve_left
from kfdist.linalg.psd import eigh_descending, symmetrise

_OVERLAP_TOLERANCE = 50.0
"""Largest entry of U^T Q, in units of rounding, that passes as orthogonal."""

_LEAST_OUTSIDE = 0.25
"""Least square of a unit vector's part outside a span whose direction has lost no more than a bit to rounding."""

_SMALLEST_KEPT = 32.0
"""Length, in units of rounding of the rows' own lengths, below which a direction of theirs is rounding."""


def brand_update(
    vectors: Float[Tensor, "c d r"], values: Float[Tensor, "c r"], rows: Float[Tensor, "c n d"]
) -> tuple[Float[Tensor, "c d s"], Float[Tensor, "c s"]]:
    """Computes the eigendecomposition of U diag(w) U^T + B B^T for B = rows^T, exactly: nothing is cut off.

    Splits B = U P + E with E orthogonal to U, E = Q R, and decomposes the small matrix of algorithms.md 4.1,
    [[diag(w) + P P^T, P R^T], [R P^T, R R^T]] = Z diag(w+) Z^T; then U+ = [U Q] Z. E is made orthogonal to U twice:
    where rows lie nearly within the span of U, rounding of the first pass is not small beside E.
    O(d (r + n)^2 + (r + n)^3).

    R comes from E^T E, summed in float64, and Q = E R^{-1} isn't formed: with the blocks X and Y of Z,
    U+ = U X + E R^{-1} Y. That is all products. Where E is so near to having dependent columns that orthogonality
    would be lost, Q and R come from Householder reflections, in about twice the time.

    Args:
        vectors: U; r may be 0.
        values: w.
        rows: Zero and repeated rows and such within the span of U add eigenvalues of 0, or none.

    Returns:
        U+ and w+; s is r + n, or less where rows depend on each other but for rounding.

    Raises:
        ValueError: r + n > d: more columns than dimensions can't be orthogonal.
        torch.linalg.LinAlgError: LAPACK's iteration didn't converge.
    """
    d, r, n = vectors.shape[-2], vectors.shape[-1], rows.shape[-2]
    if r + n > d:
        raise ValueError(f"rank {r} and {n} rows don't fit into {d} dimensions; sketch the rows or lower the rank")
    P = vectors.mT @ rows.mT
    E = torch.baddbmm(rows, P.mT, vectors.mT, alpha=-1).mT
    rest = vectors.mT @ E  # what the second pass takes off
    factor = _factor(E, P, rest)
    if factor is None:
        Q, R = _complement(vectors, torch.baddbmm(E.mT, rest.mT, vectors.mT, alpha=-1).mT)
        found, Z = _core(values, P + rest, R)
        return torch.cat([vectors, Q], -1) @ Z, found
    R, inverse = factor
    found, Z = _core(values, P + rest, R)
    X, Y = Z.split([r, R.shape[-2]], dim=-2)
    Y = inverse @ Y
    return (vectors @ (X - rest @ Y)).baddbmm_(E, Y), found


def _core(
    values: Float[Tensor, "c r"], P: Float[Tensor, "c r n"], R: Float[Tensor, "c n n"]
) -> tuple[Float[Tensor, "c r+n"], Float[Tensor, "c r+n r+n"]]:
    """Returns the eigenvalues, not negative, and the eigenvectors of what is to be decomposed in the basis [U Q]."""
    corner = torch.cat([P, R], -2)
    small = corner @ corner.mT
    small.diagonal(dim1=-2, dim2=-1)[..., : values.shape[-1]].add_(values)
    found, Z = eigh_descending(small)
    return found.clamp_min(0), Z


def _factor(
    columns: Float[Tensor, "c d n"], first: Float[Tensor, "c r n"], overlap: Float[Tensor, "c r n"]
) -> tuple[Float[Tensor, "c m n"], Float[Tensor, "c n m"]] | None:
    """Returns R and R^+ for E - U (U^T E) = Q R with m <= n columns of Q; None where Q wouldn't be orthogonal enough.

    R is the Cholesky factor of the Gram matrix. Where that has none, since rows are repeated or otherwise dependent, it
    is S V^T D of the eigenpairs V S^2 V^T of the Gram matrix of E D^{-1}, where D are the rows' lengths: those of
    lengths S at the level of rounding of the rows are left out.

    Args:
        columns: E.
        first: U^T B, what E has lost of the rows already.
        overlap: U^T E.
    """
    if not products_are_exact(columns.device):
        return None
    wide = overlap.double()
    squares = gram(columns).baddbmm_(wide.mT, wide, alpha=-1)
    triangle = cholesky(squares)
    if triangle is None or not triangle.loses_at_most(LOSS_TOLERANCE, columns.dtype):
        triangle = _dependent(squares, first, columns.dtype)  # of repeated rows the last pivots' signs are rounding
    if triangle is None or not triangle.loses_at_most(LOSS_TOLERANCE, columns.dtype):
        return None
    return triangle.R.to(columns), triangle.inverse.to(columns)


def _dependent(gram: Float[Tensor, "c n n"], first: Float[Tensor, "c r n"], dtype: torch.dtype) -> Triangle | None:
    """Returns R of columns that depend on each other; None in float64, or where groups differ in how many are left."""
    if dtype == gram.dtype:
        return None  # lengths below the root of its rounding are unknown
    lengths = (gram.diagonal(dim1=-2, dim2=-1).clamp_min(0) + first.double().square().sum(-2)).sqrt()
    scales = torch.where(lengths > 0, 1 / lengths, 0)
    squares, V = eigh_descending(scales.unsqueeze(-1) * gram * scales.unsqueeze(-2))
    kept = (squares > (_SMALLEST_KEPT * torch.finfo(dtype).eps) ** 2).sum(-1)
    m = int(kept.max())
    if m + first.shape[-2] == 0 or m != int(kept.min()):
        return None
    S, V = squares[..., :m].sqrt(), V[..., :m]
    R = S.unsqueeze(-1) * V.mT * lengths.unsqueeze(-2)
    return Triangle.of(R, scales.unsqueeze(-1) * V / S.unsqueeze(-2), gram)


def _complement(
    vectors: Float[Tensor, "c d r"], columns: Float[Tensor, "c d n"]
) -> tuple[Float[Tensor, "c d n"], Float[Tensor, "c n n"]]:
    """Returns Q with orthonormal columns, orthogonal to U, and R with E = Q R, for E orthogonal to U."""
    Q, R = torch.linalg.qr(columns)
    overlap = vectors.mT @ Q
    if not overlap.numel() or float(overlap.abs().max()) <= _OVERLAP_TOLERANCE * torch.finfo(Q.dtype).eps:
        return Q, R
    # E has (nearly) dependent columns. For these, Q is filled up with directions that know nothing of U, and may lie
    # within its span. What of them is outside is made orthonormal again, in a third of the time of the QR of [U E].
    rest = Q - vectors @ overlap
    if float(rest.square().sum(-2).min()) > _LEAST_OUTSIDE:
        Q = torch.linalg.qr(rest).Q
    else:  # too little is outside; Householder reflections of [U E] leave them no other place
        Q = torch.linalg.qr(torch.cat([vectors, columns], -1)).Q[..., vectors.shape[-1] :]
    return Q, Q.mT @ columns


def update_errors(
    before: tuple[Float[Tensor, "c d r"], Float[Tensor, "c r"]],
    rows: Float[Tensor, "c n d"],
    after: tuple[Float[Tensor, "c d s"], Float[Tensor, "c s"]],
    probes: Float[Tensor, "c d k"],
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Estimates how exact an update is and how orthonormal its basis, in O(d (r + n)).

    The first is ||(S - U+ w+ U+^T) Z|| / ||S Z|| for S = U w U^T + rows^T rows, Frobenius, and for S = 0 the size of
    the difference. The second is ||U+^T U+ T - T|| / ||T|| for T = U+^T Z, random too: U+ is read three times for both.

    Args:
        before: U and w.
        rows: What was added.
        after: U+ and w+.
        probes: Z, Gaussian.
    """
    vectors, values = after
    T = (probes.mT @ vectors).mT  # in this order a matrix of rows is read as it lies, in half the time
    found, spanned = (vectors @ torch.cat([values.unsqueeze(-1) * T, T], -1)).chunk(2, dim=-1)
    expected = _product(*before, probes) + ((rows @ probes).mT @ rows).mT
    difference, size = torch.linalg.matrix_norm(found - expected), torch.linalg.matrix_norm(expected)
    residual = torch.where(size > 0, difference / size, difference)
    return residual, torch.linalg.matrix_norm((spanned.mT @ vectors).mT - T) / torch.linalg.matrix_norm(T)


def _product(
    vectors: Float[Tensor, "c d r"], values: Float[Tensor, "c r"], columns: Float[Tensor, "c d k"]
) -> Float[Tensor, "c d k"]:
    return vectors @ (values.unsqueeze(-1) * (columns.mT @ vectors).mT)


def orthogonality_error(vectors: Float[Tensor, "c d r"]) -> Float[Tensor, " c"]:
    """Returns ||U^T U - I||, Frobenius; O(d r^2)."""
    gram = vectors.mT @ vectors
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return torch.linalg.matrix_norm(gram)


def reorthogonalise(
    vectors: Float[Tensor, "c d r"], values: Float[Tensor, "c r"]
) -> tuple[Float[Tensor, "c d r"], Float[Tensor, "c r"]]:
    """Finds the eigendecomposition of U diag(w) U^T where the columns of U are no longer orthonormal.

    U = Q R by Householder reflections, R diag(w) R^T = Z diag(w+) Z^T, U+ = Q Z.

    Returns:
        U+ and w+; U+ w+ U+^T = U w U^T up to rounding.

    Raises:
        torch.linalg.LinAlgError: LAPACK's iteration didn't converge.
    """
    Q, R = torch.linalg.qr(vectors)
    found, Z = eigh_descending((R * values.unsqueeze(-2)) @ R.mT)
    return Q @ Z, found.clamp_min(0)


def light_correction(
    vectors: Float[Tensor, "c d r"],
    values: Float[Tensor, "c r"],
    matrix: Float[Tensor, "c d d"],
    columns: Int64[Tensor, " m"],
) -> tuple[Float[Tensor, "c d r"], Float[Tensor, "c r"]]:
    """Refreshes some eigenpairs from the matrix that they stand for (B-KFAC-C, algorithms.md 4.2).

    H = U_S^T M U_S = Z diag(theta) Z^T, U_S <- U_S Z, w_S <- theta, sorted again. The best choice within the span of
    U_S: ||M - U w U^T|| never grows, Frobenius. The span of U stays as it is. O(d^2 m).

    Args:
        vectors: U.
        values: w.
        matrix: M, symmetric positive semi-definite.
        columns: Positions S, distinct.

    Raises:
        torch.linalg.LinAlgError: LAPACK's iteration didn't converge.
    """
    chosen = vectors[..., columns]
    theta, Z = eigh_descending(symmetrise(chosen.mT @ (matrix @ chosen)))
    vectors = vectors.index_copy(-1, columns, chosen @ Z)
    values = values.index_copy(-1, columns, theta.clamp_min(0))
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return vectors.gather(-1, order.unsqueeze(-2).expand_as(vectors)), values


def draw_columns(r: int, m: int, *, seed: int, device: torch.device) -> Int64[Tensor, " {m}"]:
    """Draws m of r positions uniformly at random without replacement, the same on every device."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randperm(r, generator=generator, device="cpu")[:m].to(device)


def solve_rows(
    A: Spectrum,
    G: Spectrum,
    dampings: tuple[Float[Tensor, " c"], Float[Tensor, " c"]],
    rows: tuple[Float[Tensor, "c n q"], Float[Tensor, "c n p"]],
    examples: float,
) -> Float[Tensor, "c p q"]:
    """Computes (G + lambda_G I)^{-1} V (A + lambda_A I)^{-1} for V = g^T a/N from the rows (algorithms.md 4.3).

    (1/N) [(G + lambda_G I)^{-1} g^T] [(A + lambda_A I)^{-1} a^T]^T: O((p + q) n r) and the O(p q n) that forming V
    costs, instead of the O(p q r) of solving for V. It pays where n is less than about twice r_A + r_G.

    Args:
        A: Spectrum of the factor of the inputs.
        G: Spectrum of the factor of the output gradients.
        dampings: lambda_A and lambda_G, positive.
        rows: a, and g of the per-example loss; n counts positions where there are several.
        examples: N.
    """
    a, g = rows
    return solve_left(G, dampings[1], g.mT) @ solve_left(A, dampings[0], a.mT).mT / examples
