r"""The quadratic model of the objective in the span of a few directions, solved exactly (algorithms.md 1.2, step 4).

M(d) = 1/2 d^T (F + (lambda + eta) I) d + grad^T d + h with the exact F. For d = sum_i c_i d_i only inner products are
needed: with B_ij = d_i^T F d_j + (lambda + eta) d_i^T d_j and b_i = grad^T d_i, the best c solves B c = -b.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class InnerProducts:
    """Inner products of m directions; float64 on the CPU.

    Attributes:
        slopes: grad^T d_i, `[m]`; the gradient includes the weight decay.
        fisher: d_i^T F d_j, `[m, m]`.
        gram: d_i^T d_j, `[m, m]`.
    """

    slopes: Tensor
    fisher: Tensor
    gram: Tensor


@dataclass(frozen=True, kw_only=True)
class ModelStep:
    """The minimiser of the model in the span of the directions.

    Attributes:
        coefficients: c_i, one per direction.
        change: M(d) - h with the damping in M; candidates for gamma are compared by it.
        undamped_change: The same without lambda but with eta: the change of the objective if it were quadratic. The
            reduction ratio is formed with it, so that it is 1 on a quadratic (check K6).
    """

    coefficients: tuple[float, ...]
    change: float
    undamped_change: float


def minimise_model(
    products: InnerProducts, *, damping: float, weight_decay: float, relative_accuracy: float
) -> ModelStep | None:
    """Minimises the model over the span of the directions.

    Directions are brought to the same scale first. If they are dependent (the last step is a multiple of the new one,
    or zero), the pseudo-inverse gives the smallest of the equivalent solutions.

    Args:
        products: Inner products of the directions.
        damping: lambda.
        weight_decay: eta.
        relative_accuracy: Accuracy of the inner products; eigenvalues of the scaled system below it count as 0.

    Returns:
        The step, or None if an inner product is not finite.
    """
    b, gram = products.slopes, products.gram
    curvature = products.fisher + weight_decay * gram
    B = curvature + damping * gram
    if not bool(torch.isfinite(b).all() and torch.isfinite(B).all()):
        return None
    diagonal = B.diagonal()
    scale = torch.where(diagonal > 0, diagonal.clamp_min(torch.finfo(B.dtype).tiny).rsqrt(), 0.0)
    values, vectors = torch.linalg.eigh(scale[:, None] * B * scale)
    kept = values > relative_accuracy
    inverse = torch.where(kept, 1.0 / torch.where(kept, values, 1.0), 0.0)
    c = -scale * (vectors @ (inverse * (vectors.mT @ (scale * b))))
    return ModelStep(
        coefficients=tuple(c.tolist()),
        change=float(0.5 * c @ B @ c + b @ c),
        undamped_change=float(0.5 * c @ curvature @ c + b @ c),
    )


def gram(vectors: Sequence[Sequence[Tensor]]) -> Tensor:
    """Returns all inner products of vectors that are given in pieces, equally shaped in all; float64, on their device.

    One piece after the other is made float64, so that no vector is copied whole.
    """

    def joined(alike: Sequence[Tensor]) -> Tensor:
        piece = alike[0].new_empty(len(alike), alike[0].numel(), dtype=torch.float64)
        for row, each in zip(piece, alike, strict=True):  # in one pass over each
            row.copy_(each.reshape(-1))
        return piece

    pieces = map(joined, zip(*vectors, strict=True))
    return torch.stack([piece @ piece.mT for piece in pieces]).sum(0)
