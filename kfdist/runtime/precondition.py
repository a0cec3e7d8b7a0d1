"""Applies adopted snapshots to the gradients in `.grad`, with the KL clip; no host sync."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfdist.curvature.blocks import Block
from kfdist.curvature.preconditioners import AbstractPreconditioner


@dataclass(frozen=True, kw_only=True)
class Application:
    """How one block's gradient is treated this step.

    Attributes:
        block: The block.
        preconditioner: Its adopted preconditioner.
        damping: lambda, already raised where the staleness policy says so.
        fallback: Use V / (lambda + tau) instead.
    """

    block: Block
    preconditioner: AbstractPreconditioner
    damping: float
    fallback: bool


def precondition_gradients(
    applications: Sequence[Application],
    *,
    kl_clip: float | None,
    learning_rate: Callable[[nn.Parameter], float],
) -> None:
    r"""Replaces each V_l in `.grad` by nu U_l with U_l = (F_l + lambda I)^-1 V_l.

    nu = min(1, sqrt(kappa / sum_l lr_l^2 <U_l, V_l>)) bounds the step's predicted KL divergence by kappa (algorithms.md
    1.4); where the sum is not positive nu is 1. A layer's learning rate is its weight's.

    Args:
        applications: The blocks that have a gradient and a snapshot.
        kl_clip: kappa; None turns the clip off.
        learning_rate: The learning rate of a parameter; asked only with a `kl_clip`.
    """
    if not applications:
        return
    directions = []
    total: Tensor | None = None
    for each in applications:
        V = each.block.gradient()
        P = each.preconditioner
        U = P.fallback(V, each.damping) if each.fallback else P.apply(V, each.damping)
        directions.append(U)
        if kl_clip is not None:
            term = learning_rate(each.block.parameters()[0]) ** 2 * torch.sum(U * V)
            total = term if total is None else total + term
    nu = None
    if kl_clip is not None and total is not None:
        # clamp keeps sqrt and division defined where the sum is not positive; there the minimum picks 1.
        nu = torch.sqrt(kl_clip / total.clamp_min(torch.finfo(total.dtype).tiny)).clamp_max(1.0)
    for each, U in zip(applications, directions, strict=True):
        each.block.write_gradient(U if nu is None else U * nu.to(U.dtype))
