"""SENG in its pieces: one call from samples to a direction, and the formulas of algorithms.md 6 written out."""

from dataclasses import replace

import torch
from torch import Tensor

from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverters import Seng
from kfdist.curvature.inverters.seng_directions import SengPreconditioner
from kfdist.curvature.references import example_gradients
from kfdist.curvature.statistics import Samples


def invert(inverter: Seng, samples: Samples, *, seed: int = 0) -> SengPreconditioner:
    made = inverter.invert(samples, damping=1.0, previous={}, seed=seed).preconditioner
    assert isinstance(made, SengPreconditioner)
    return made


def direction(made: SengPreconditioner, gradient: Tensor, damping: float) -> Tensor:
    """Applies, and makes sure that the direction isn't the replacement for one that points uphill."""
    memory = BlockMemory()
    found = made.apply(gradient, damping, memory)
    assert int(memory.counts["non_descent"]) == 0
    return found


def from_sources(samples: Samples, source: list[int]) -> Samples:
    return replace(samples, source=torch.tensor(source))


def columns_of(samples: Samples) -> Tensor:
    """Returns U `[c, p q, n]` of algorithms.md 6.1, on row-major vectors, in float64."""
    weight = samples.weight.double()
    rows = example_gradients(samples).flatten(2) * (weight / weight.sum()).sqrt()[:, None, None]
    return rows.permute(1, 2, 0)


def woodbury(U: Tensor, gram: Tensor, projected: Tensor, damping: float, gradient: Tensor) -> Tensor:
    """Returns (v - U (lambda I + K)^{-1} x)/lambda, `[c, p, q]`, by a dense solver.

    Args:
        U: `[c, D, n]`.
        gram: K, an estimate of U^T U, `[c, n, n]`.
        projected: x, an estimate of U^T v, `[c, n, 1]`.
        damping: lambda.
        gradient: V, `[c, p, q]`.
    """
    b = torch.linalg.solve(gram + damping * torch.eye(gram.shape[-1], dtype=gram.dtype), projected)
    return ((gradient.flatten(1).unsqueeze(-1) - U @ b) / damping).reshape(gradient.shape)


def dense_operator(made: SengPreconditioner, damping: float) -> Tensor:
    """Returns what `apply` multiplies by, `[c, D, D]`, one unit gradient at a time."""
    c, p, q = made.shape
    columns = []
    for entry in range(p * q):
        unit = torch.zeros(c, p * q, dtype=torch.float64)
        unit[:, entry] = 1
        columns.append(direction(made, unit.view(c, p, q), damping).flatten(1))
    return torch.stack(columns, -1)
