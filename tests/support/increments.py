"""Increments that stand for given factors, and sequences of them with the dense truth beside."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kfdist.curvature.averages import decay_at
from kfdist.curvature.inverter import Inversion
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.statistics import Increment, KroneckerFactors
from tests.support.matrices import gaussian


def root_rows(matrix: Tensor) -> Tensor:
    """Returns rows `[c, d, d]` with rows^T rows = M, the longest last; the last is spoiled where M is not finite."""
    finite = torch.where(matrix.isfinite(), matrix, torch.zeros_like(matrix)).double()
    values, vectors = torch.linalg.eigh(finite)
    rows = (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)).mT.contiguous().to(matrix.dtype)
    spoiled = matrix[~matrix.isfinite()]
    if spoiled.numel():
        rows[0, -1, 0] = spoiled[0]
    return rows


def increment_of(factors: KroneckerFactors, *, rows: bool, dense: bool) -> Increment:
    """Returns the first increment of a block whose factors are these."""
    A, G = factors.A, factors.G
    c = A.shape[0]
    return Increment(
        A_rows=root_rows(A) if rows else A.new_zeros(c, 0, A.shape[-1]),
        G_rows=root_rows(G) if rows else G.new_zeros(c, 0, G.shape[-1]),
        examples=A.new_ones(()),
        positions=A.new_ones(()),
        decay=A.new_zeros(()),
        A=A if dense else A.new_zeros(c, 0, 0),
        G=G if dense else G.new_zeros(c, 0, 0),
    )


def rows_alone(factors: KroneckerFactors) -> Increment:
    return increment_of(factors, rows=True, dense=False)


def dense_alone(factors: KroneckerFactors) -> Increment:
    return increment_of(factors, rows=False, dense=True)


def rows_and_dense(factors: KroneckerFactors) -> Increment:
    return increment_of(factors, rows=True, dense=True)


def folding_sequence(
    counts: Sequence[int],
    *,
    q: int,
    p: int,
    room: int,
    dense_at: Callable[[int], bool] = lambda k: True,
    decay: float = 0.9,
    c: int = 1,
    dtype: torch.dtype = torch.float64,
    spectrum: float = 1.0,
) -> tuple[list[Increment], list[KroneckerFactors]]:
    """Makes increments as a run of one rank would, and the dense moving averages that they follow.

    Args:
        counts: Examples of each folding; 0 for a dropped batch.
        q: Size of A.
        p: Size of G.
        room: Rows of every increment, filled up with zeros.
        dense_at: Whether an increment, counted from 0, carries the dense factors.
        decay: Of the average, but for the first foldings.
        c: Groups.
        dtype: Of the increments; the averages are float64.
        spectrum: Ratio of the standard deviations of two neighbouring coordinates.
    """
    sums = {"A": torch.zeros(c, q, q, dtype=torch.float64), "G": torch.zeros(c, p, p, dtype=torch.float64)}
    weight, increments, averages = 0.0, [], []
    for k, n in enumerate(counts):
        rho = decay_at(k + 1, decay)
        weight = rho * weight + (1 - rho) * n
        rows = {}
        for label, d, seed in (("A", q, 2 * k), ("G", p, 2 * k + 1)):
            own = (1 - rho) ** 0.5 * gaussian(c, n, d, seed=seed) * spectrum ** torch.arange(d)
            rows[label] = torch.cat([own, torch.zeros(c, room - n, d, dtype=torch.float64)], 1).to(dtype)
            sums[label] = rho * sums[label] + own.mT @ own
        factors = KroneckerFactors(A=sums["A"] / weight, G=sums["G"] / weight) if weight else None
        carried = factors if factors is not None and dense_at(k) else None
        absent = torch.zeros(c, 0, 0, dtype=dtype)
        increments.append(
            Increment(
                A_rows=rows["A"],
                G_rows=rows["G"],
                examples=torch.tensor((1 - rho) * n, dtype=dtype),
                positions=torch.tensor((1 - rho) * n, dtype=dtype),
                decay=torch.tensor(rho, dtype=dtype),
                A=absent if carried is None else carried.A.to(dtype),
                G=absent if carried is None else carried.G.to(dtype),
            )
        )
        averages.append(factors)
    return increments, averages


def run_chain(
    name: str, increments: Sequence[Increment], *, seed: int = 5, damping: float = 1e-2, **settings: object
) -> list[Inversion]:
    """Runs one inversion after the other, each on the state of the one before."""
    inverter, done = make_inverter(name, **settings), []
    state: dict[str, Tensor] = {}
    for increment in increments:
        attempt = inverter.invert(increment, damping=damping, previous=state, seed=seed)
        state = dict(attempt.state) if attempt.preconditioner is not None else state
        done.append(attempt)
    return done
