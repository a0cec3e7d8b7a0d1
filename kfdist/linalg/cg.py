"""Conjugate gradients on matrices, several systems side by side (Hestenes & Stiefel 1952; algorithms.md 5.2).

A system's unknown is a p x q matrix, its inner product the Frobenius one; the leading dimension c holds independent
systems, each of which stops for itself.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

Operator = Callable[[Float[Tensor, "c p q"]], Float[Tensor, "c p q"]]
"""A symmetric positive definite map that keeps the systems apart."""


class CgSolution(NamedTuple):
    """Where conjugate gradients ended.

    Attributes:
        solution: The last iterate. In the energy norm it is the best of all, whatever the residual says.
        residual: ||V - Op x|| / ||V|| by the recurrence; 0 where V is zero.
        iterations: Steps taken.
        broken: Whether rounding or overflow ended it before tolerance or limit: a curvature <p, Op p> that isn't
            positive, or a number that isn't finite. With 0 iterations the solution means nothing.
    """

    solution: Float[Tensor, "c p q"]
    residual: Float[Tensor, " c"]
    iterations: Int64[Tensor, " c"]
    broken: Bool[Tensor, " c"]


def conjugate_gradient(
    operator: Operator,
    right_side: Float[Tensor, "c p q"],
    *,
    tolerance: float,
    max_iterations: int,
    start: Float[Tensor, "c p q"] | None = None,
    inverse_diagonal: Float[Tensor, "c p q"] | None = None,
) -> CgSolution:
    """Solves Op x = V approximately, without a host sync on an accelerator.

    Every system goes through the same `max_iterations` products; one that has stopped has the search direction 0. On
    the CPU the loop ends when all have stopped, with the same bits. Four tensors of V's size are held, one more with
    `inverse_diagonal`, beside what the operator needs.

    V is divided by its largest entry first, so that squares of small gradients don't underflow. The steps are the
    same, since conjugate gradients are homogeneous in V.

    Args:
        operator: Op.
        right_side: V.
        tolerance: Stop where ||V - Op x|| <= tolerance ||V||; against V also with `start`.
        max_iterations: Most steps.
        start: Guess x_prev, of any length: x_0 = <x_prev, V>/<x_prev, Op x_prev> x_prev, which in the energy norm is
            never worse than 0. Costs one more product.
        inverse_diagonal: 1/diag(Op), as Jacobi preconditioner.

    Returns:
        The solution with how it was reached.
    """
    scale = _largest(right_side)
    r = right_side / scale
    size = _inner(r, r)
    if start is None:
        x = torch.zeros_like(r)
    else:
        x, r = _scaled_start(operator, start, r)
    z = r if inverse_diagonal is None else r * inverse_diagonal
    p = z.clone()
    rz, rr = _inner(r, z), _inner(r, r)
    active = rr > tolerance**2 * size
    broken = ~rr.isfinite()
    iterations = torch.zeros_like(active, dtype=torch.int64)
    for _ in range(max_iterations):
        if _all_stopped(active):
            break
        u = operator(p)
        step = rz / _inner(p, u)
        stepping = active & (step > 0) & step.isfinite()
        broken = broken | (active & ~stepping)
        # Zeros, not products with zero: what overflowed would leave 0 * inf = NaN in a solution that is still good.
        p.masked_fill_(_wide(~stepping), 0)
        u.masked_fill_(_wide(~stepping), 0)
        step = _wide(torch.where(stepping, step, torch.zeros_like(step)))
        x.addcmul_(p, step)
        r.addcmul_(u, step, value=-1)
        del u  # else it would still be there while the next one is computed
        iterations += stepping
        z = r if inverse_diagonal is None else r * inverse_diagonal
        rr, rz_before, rz = _inner(r, r), rz, _inner(r, z)
        broken = broken | ~rr.isfinite()
        active = stepping & (rr > tolerance**2 * size)
        p.mul_(_wide(torch.where(active, rz / rz_before, torch.zeros_like(rz)))).add_(z)
        p.masked_fill_(_wide(~active), 0)
    residual = torch.where(size > 0, (rr / size).sqrt(), rr)
    return CgSolution(x.mul_(scale), residual, iterations, broken)


def _scaled_start(
    operator: Operator, start: Float[Tensor, "c p q"], right_side: Float[Tensor, "c p q"]
) -> tuple[Float[Tensor, "c p q"], Float[Tensor, "c p q"]]:
    """Returns the scaled guess and its residual; 0 and V where the guess is of no use."""
    x = start / _largest(start)
    u = operator(x)
    factor = _inner(x, right_side) / _inner(x, u)
    usable = factor.isfinite()  # 0/0 where the guess is zero
    factor = _wide(torch.where(usable, factor, torch.zeros_like(factor)))
    x.masked_fill_(_wide(~usable), 0).mul_(factor)
    u.masked_fill_(_wide(~usable), 0).mul_(factor)
    return x, right_side - u


def _inner(x: Float[Tensor, "c p q"], y: Float[Tensor, "c p q"]) -> Float[Tensor, " c"]:
    """Returns <x, y> of each system.

    One dot product a row, then their sum: it needs no product of V's size, and short sums lose less in float32.
    """
    rows = x.flatten(0, 1).unsqueeze(1) @ y.flatten(0, 1).unsqueeze(2)
    return rows.view(x.shape[:2]).sum(1)


def _largest(x: Float[Tensor, "c p q"]) -> Float[Tensor, "c 1 1"]:
    """Returns the largest magnitude of each system; 1 where it is zero."""
    largest = torch.linalg.vector_norm(x, ord=float("inf"), dim=(-2, -1), keepdim=True)
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None]


def _all_stopped(active: Tensor) -> bool:
    """Whether no system goes on, if that can be read for free: not on an accelerator, not of a tensor being traced."""
    return active.device.type == "cpu" and type(active) is Tensor and not bool(active.any())
