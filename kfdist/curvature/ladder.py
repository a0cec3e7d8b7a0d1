"""Inversion with checks before and after, and retries that are a function of the data alone.

LAPACK often passes bad input silently: the inverse of a matrix that holds Inf is finite, eigendecompositions of NaN
don't raise. So factors are checked before and results after. A result that fails its check is tried again in float64,
then with more damping where damping is part of the inversion. Faults of the machine (out of memory, a crash) are
never a rung: they propagate, and the job is retried unchanged.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kfdist.curvature.inverter import AbstractInverter, Inversion, Outcome
from kfdist.curvature.statistics import GradientMoments, Increment
from kfdist.linalg.psd import asymmetry
from kfdist.types import BlockName
from kfdist.wire.records import contiguous, move, symmetric_fields, tensor_fields

RESIDUAL_LIMIT = 1e-2
"""Largest relative error of a result that is used: a preconditioner that is 1 % off makes steps that are 1 % off, far
below the noise of its statistics."""

ASYMMETRY_LIMIT = 1e-3
"""Largest relative asymmetry of a factor; rounding leaves about d 1e-7, more means that it isn't a second moment."""

_COUNTED = 1 << 20
"""Numbers that are looked at one by one at a time."""

DAMPING_FACTORS = (10.0, 100.0, 1000.0)
"""How much more damping the last rungs try."""


def invert_group_with_ladder(
    inverter: AbstractInverter,
    statistics: Mapping[BlockName, Any],
    *,
    damping: float,
    previous: Mapping[BlockName, Mapping[str, Tensor]],
    seeds: Mapping[BlockName, int],
    symmetric: bool = False,
) -> dict[BlockName, Inversion]:
    """Inverts a group of blocks, climbing float32, float64, more damping until all results pass their checks.

    Args:
        inverter: The method.
        statistics: Its `statistic` per block, in the model's order; any numbers at all may be in them.
        damping: lambda, finite and positive.
        previous: State of the last version per block.
        seeds: The only source of randomness, per block.
        symmetric: Whether symmetric statistics are known to be: they travelled as triangles, or as rows.

    Returns:
        The outcomes; all FAILED, each with a reason, if no rung held for all of them. The preconditioners have the
        statistics' dtype, float32 at least. A failed block keeps its previous state.

    Raises:
        ValueError: `damping` isn't finite and positive, or symmetric statistics aren't square matrices of one group
            count.
    """
    if not (math.isfinite(damping) and damping > 0):
        raise ValueError(f"damping is {damping}, must be finite and positive")
    faults = {name: _input_fault(each, symmetric) for name, each in statistics.items()}
    if any(faults.values()):
        return _failed(faults, previous)
    tensor = _first_tensor(statistics)
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    troubles: list[str] = []
    for rung, (precision, factor) in enumerate(_rungs(dtype, inverter.produces.damping_at_apply)):
        given = {name: move(each, tensor.device, precision) for name, each in statistics.items()}
        attempts = _attempt(inverter, given, damping * factor, previous, seeds)
        found = {name: _result_fault(attempt) for name, attempt in attempts.items()}
        trouble = "; ".join(text if len(found) == 1 else f"{name}: {text}" for name, text in found.items() if text)
        if not trouble:
            reached = Outcome.MORE_DAMPING if factor > 1 else Outcome.DONE if precision == dtype else Outcome.FLOAT64
            used = {"rung": float(rung), "damping": damping * factor}
            return {
                name: replace(
                    attempt,
                    preconditioner=contiguous(attempt.preconditioner.to(tensor.device, dtype)),
                    outcome=Outcome.worst(reached, attempt.outcome),
                    reason="; ".join(troubles),
                    diagnostics={key: each for key, each in attempt.diagnostics.items() if math.isfinite(each)} | used,
                )
                for name, attempt in attempts.items()
                if attempt.preconditioner is not None
            }
        troubles.append(f"{str(precision).removeprefix('torch.')} at damping {damping * factor:.3g}: {trouble}")
    return _failed(dict.fromkeys(statistics, "no rung held: " + "; ".join(troubles)), previous)


def _failed(
    reasons: Mapping[BlockName, str], previous: Mapping[BlockName, Mapping[str, Tensor]]
) -> dict[BlockName, Inversion]:
    """Fails the whole group: its blocks are adopted together or not at all."""
    first = next(f"block {name!r} of the group failed: {reason}" for name, reason in reasons.items() if reason)
    return {
        name: Inversion.failed(reason or first, {key: each.clone() for key, each in previous.get(name, {}).items()})
        for name, reason in reasons.items()
    }


def _first_tensor(statistics: Mapping[BlockName, Any]) -> Tensor:
    """Returns a tensor that tells the statistics' device and dtype."""
    tensors = (each for record in statistics.values() for each in tensor_fields(record).values())
    return next(each for each in tensors if each.is_floating_point())


def _rungs(dtype: torch.dtype, damping_at_apply: bool) -> Iterator[tuple[torch.dtype, float]]:
    """Yields precision and factor of the damping; more damping only where it is part of the inversion."""
    yield dtype, 1.0
    if dtype != torch.float64:
        yield torch.float64, 1.0
    if not damping_at_apply:
        yield from ((torch.float64, factor) for factor in DAMPING_FACTORS)


def _attempt(
    inverter: AbstractInverter,
    statistics: Mapping[BlockName, Any],
    damping: float,
    previous: Mapping[BlockName, Mapping[str, Tensor]],
    seeds: Mapping[BlockName, int],
) -> Mapping[BlockName, Inversion]:
    try:
        return inverter.invert_group(statistics, damping=damping, previous=previous, seeds=seeds)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]  # documented, not declared
        return dict.fromkeys(statistics, Inversion.failed(f"LAPACK gave up: {error}"))


def _input_fault(statistics: Any, known_symmetric: bool) -> str:
    """Returns what makes a block's statistics useless, or nothing.

    Raises:
        ValueError: A symmetric field isn't square matrices, or not of as many groups as the others.
    """
    symmetric = symmetric_fields(statistics)
    _check_shapes(statistics, symmetric)
    faults = (
        _matrix_fault(f"factor {label}", tensor, known_symmetric)
        if label in symmetric
        else _number_fault(label, tensor)
        for label, tensor in tensor_fields(statistics).items()
    )
    return next(filter(None, faults), "")


def _check_shapes(statistics: Any, symmetric: Collection[str]) -> None:
    matrices = {label: tensor for label, tensor in tensor_fields(statistics).items() if label in symmetric}
    for label, matrix in matrices.items():
        absent = isinstance(statistics, Increment | GradientMoments) and matrix.shape[-2:] == (0, 0)
        if matrix.dim() != 3 or matrix.shape[-1] != matrix.shape[-2] or (matrix.numel() == 0 and not absent):
            raise ValueError(f"factor {label} has shape {tuple(matrix.shape)}, must be [c, d, d]")
        if not matrix.is_floating_point():
            raise ValueError(f"factor {label} is {matrix.dtype}, must be floating-point")
    if len({matrix.shape[0] for matrix in matrices.values()}) > 1:
        listed = ", ".join(f"{label} has {matrix.shape[0]} groups" for label, matrix in matrices.items())
        raise ValueError(f"factor {listed}; must be the same")


def _number_fault(what: str, tensor: Tensor) -> str:
    if _is_finite(tensor):
        return ""
    bad = sum(int((~some.isfinite()).sum()) for some in tensor.reshape(-1).split(_COUNTED))
    return f"{what} holds {bad} non-finite of {tensor.numel()} numbers; find the batch that made them" if bad else ""


def _is_finite(tensor: Tensor) -> bool:
    """Says whether the sum is finite: not so if any number isn't, or, which is rare, if the sum is too large."""
    return math.isfinite(float(tensor.sum()))


def _matrix_fault(what: str, matrix: Tensor, known_symmetric: bool) -> str:
    """Returns what makes a factor no second moment at all, or nothing."""
    fault = _number_fault(what, matrix)
    if fault or not matrix.numel():
        return fault
    relative = 0.0 if known_symmetric else float(asymmetry(matrix).max())
    if relative > ASYMMETRY_LIMIT:
        return f"{what} is not symmetric: relative difference {relative:.3g}, rounding makes {ASYMMETRY_LIMIT:g}"
    lowest = float(matrix.diagonal(dim1=-2, dim2=-1).min())
    if lowest < 0:
        return f"{what} has {lowest:.3g} on its diagonal; sums of squares can't be negative"
    return ""


def _result_fault(attempt: Inversion) -> str:
    """Returns why a result can't be used, or nothing."""
    if attempt.preconditioner is None:
        return attempt.reason or "no result"
    for name, tensor in tensor_fields(attempt.preconditioner).items():
        if not _is_finite(tensor) and not bool(tensor.isfinite().all()):
            return f"{name} of the result is not finite"
    for name, residual in attempt.diagnostics.items():
        if name.startswith("residual_") and not residual <= RESIDUAL_LIMIT:  # also catches NaN
            label = name.removeprefix("residual_")
            return f"factor {label}: residual {residual:.3g}, at most {RESIDUAL_LIMIT:g} is allowed"
    return ""
