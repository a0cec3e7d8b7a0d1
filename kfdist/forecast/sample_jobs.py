"""Statistics of a block of any shape, noise with a falling spectrum: for jobs that measure what inversions take."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kfdist.curvature.inverters import AbstractInverter
from kfdist.curvature.statistics import (
    MODES,
    ChainFactors,
    CoarseFactors,
    DiagonalFactors,
    GradientMoments,
    Increment,
    KroneckerFactors,
    Needs,
    Samples,
)
from kfdist.types import BlockShape

_EXCESS = 2
"""Rows of noise for each dimension: factors of full rank."""


_float32 = partial(torch.full, dtype=torch.float32, device="cpu")


def statistics_of(inverter: AbstractInverter, shape: BlockShape) -> Any:
    """Returns a statistic as the method takes it, of one block that is alone in its group.

    Args:
        inverter: The method.
        shape: The block's; of one matrix.
    """
    make = _MAKERS[inverter.statistic]
    return make(shape, inverter.needs(shape))


def _rows(count: int, width: int, seed: int) -> Tensor:
    """Returns rows whose second moment has eigenvalues from 1 down to 1e-3."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    rows = torch.randn(count, width, generator=generator, dtype=torch.float32, device="cpu")
    return rows * torch.logspace(0, -1.5, width, dtype=torch.float32, device="cpu")


def _factor(width: int, seed: int) -> Tensor:
    rows = _rows(_EXCESS * width, width, seed)
    return (rows.mT @ rows / len(rows))[None]


def _kronecker(kind: Callable[..., Any], shape: BlockShape, needs: Needs, **more: Tensor) -> Any:
    del needs
    return kind(A=_factor(shape.d_in, 1), G=_factor(shape.d_out, 2), **more)


def _chain(shape: BlockShape, needs: Needs) -> ChainFactors:
    last = {"A_next": _float32((1, shape.d_in, 0), 0.0), "G_next": _float32((1, shape.d_out, 0), 0.0)}
    return _kronecker(ChainFactors, shape, needs, **last)


def _coarse(shape: BlockShape, needs: Needs) -> CoarseFactors:
    return _kronecker(CoarseFactors, shape, needs, a_cross=_float32((1,), 1.0), g_cross=_float32((1,), 1.0))


def _diagonal(shape: BlockShape, needs: Needs) -> DiagonalFactors:
    del needs
    return DiagonalFactors(A_diagonal=_float32((1, shape.d_in), 0.1), G=_factor(shape.d_out, 2))


def _samples(shape: BlockShape, needs: Needs) -> Samples:
    budget = needs.samples
    assert budget is not None, "a method that takes samples has a budget"
    n, t = budget.examples, (budget.columns or 1) if shape.convolution else 1
    ones = _float32((n,), 1.0)
    return Samples(
        a=_rows(n * t, shape.d_in, 1).view(1, n, t, shape.d_in),
        g=_rows(n * t, shape.d_out, 2).view(1, n, t, shape.d_out),
        weight=ones,
        terms=ones.clone(),
        source=torch.zeros(n, dtype=torch.int64, device="cpu"),
        positions=_float32((n,), float(t)),
    )


def _increment(shape: BlockShape, needs: Needs) -> Increment:
    def rows(name: str, width: int, seed: int) -> Tensor:
        count = needs.increment_rows if name in needs.increments else 0
        return _rows(count, width, seed)[None] / max(count, 1) ** 0.5

    def dense(name: str, width: int, seed: int) -> Tensor:
        return _factor(width, seed) if name in needs.sums else _float32((1, 0, 0), 0.0)

    one = _float32((), 1.0)
    return Increment(
        A_rows=rows("A", shape.d_in, 3),
        G_rows=rows("G", shape.d_out, 4),
        examples=one,
        positions=one.clone(),
        decay=_float32((), 0.0),
        A=dense("A", shape.d_in, 1),
        G=dense("G", shape.d_out, 2),
    )


def _moments(shape: BlockShape, needs: Needs) -> GradientMoments:
    del needs
    sums = {
        name: _factor(d, seed) for seed, (name, d) in enumerate(zip(MODES, shape.dimensions, strict=False), start=1)
    }
    absent = {name: _float32((1, 0, 0), 0.0) for name in MODES if name not in sums}
    return GradientMoments(**sums, **absent, weight=_float32((1,), 1.0))


_MAKERS: Mapping[type, Callable[[BlockShape, Needs], Any]] = {
    KroneckerFactors: partial(_kronecker, KroneckerFactors),
    ChainFactors: _chain,
    CoarseFactors: _coarse,
    DiagonalFactors: _diagonal,
    Samples: _samples,
    Increment: _increment,
    GradientMoments: _moments,
}
