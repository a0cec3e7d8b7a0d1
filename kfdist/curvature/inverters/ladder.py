"""Inversion with checks before and after, and retries that are a function of the data alone.

LAPACK often passes bad input silently: the inverse of a matrix that holds Inf is finite, eigendecompositions of NaN
don't raise. So factors are checked before and results after. A result that fails its check is tried again in float64,
then with more damping where damping is part of the inversion. Faults of the machine (out of memory, a crash) are
never a
rung: they propagate, and whoever runs the job tries it again as it was.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kfdist.curvature.inverters.base import AbstractInverter, Inversion
from kfdist.curvature.inverters.base import Outcome as Outcome
from kfdist.curvature.preconditioners import AbstractPreconditioner
from kfdist.curvature.records import contiguous, move, tensor_fields
from kfdist.curvature.statistics import KroneckerFactors
from kfdist.linalg.psd import asymmetry

RESIDUAL_LIMIT = 1e-2
"""Largest relative error of a result that is used: a preconditioner that is 1 % off makes steps that are 1 % off, far
below the noise of its statistics."""

ASYMMETRY_LIMIT = 1e-3
"""Largest relative asymmetry of a factor; rounding leaves about d 1e-7, more means that it isn't a second moment."""

DAMPING_FACTORS = (10.0, 100.0, 1000.0)
"""How much more damping the last rungs try."""


@dataclass(frozen=True, kw_only=True)
class BlockOutcome:
    """How the inversion of one block ended.

    Attributes:
        preconditioner: The result; None if it failed.
        outcome: Which rung held, with a sentence.
        reason: What went wrong on the way, for people; empty if nothing did.
        diagnostics: Finite numbers: `residual_*`, `smallest_eigenvalue_*`, `rank_*`, the `rung` (from 0) and the
            `damping` it used.
        state: Tensors that the next version gets back as `previous`.
    """

    preconditioner: AbstractPreconditioner | None
    outcome: Outcome
    reason: str = ""
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)


def invert_with_ladder(
    inverter: AbstractInverter,
    factors: KroneckerFactors,
    *,
    damping: float,
    previous: Mapping[str, Tensor],
    seed: int,
) -> BlockOutcome:
    """Inverts one block, climbing float32, float64, more damping until a result passes its checks.

    Args:
        inverter: The method.
        factors: A `[c, q, q]`, G `[c, p, p]`; anything at all may be in them.
        damping: lambda, finite and positive.
        previous: State of the last version.
        seed: The only source of randomness.

    Returns:
        The outcome; FAILED with a reason if no rung held. The preconditioner has the factors' dtype, float32 at least.

    Raises:
        ValueError: `damping` isn't finite and positive, or the factors aren't square matrices of one group count.
    """
    if not (math.isfinite(damping) and damping > 0):
        raise ValueError(f"damping is {damping}, must be finite and positive")
    _check_shapes(factors)
    fault = _input_fault("A", factors.A) or _input_fault("G", factors.G)
    if fault:
        return BlockOutcome(preconditioner=None, outcome=Outcome.FAILED, reason=fault)
    dtype = torch.promote_types(factors.A.dtype, torch.float32)
    troubles: list[str] = []
    for rung, (precision, factor) in enumerate(_rungs(dtype, inverter.produces.damping_at_apply)):
        attempt = _attempt(inverter, move(factors, factors.A.device, precision), damping * factor, previous, seed)
        trouble = _result_fault(attempt)
        if not trouble and attempt.preconditioner is not None:
            reached = Outcome.MORE_DAMPING if factor > 1 else Outcome.DONE if precision == dtype else Outcome.FLOAT64
            return BlockOutcome(
                preconditioner=contiguous(attempt.preconditioner.to(factors.A.device, dtype)),
                outcome=Outcome.worst(reached, attempt.outcome),
                reason="; ".join(troubles),
                diagnostics={**_finite(attempt.diagnostics), "rung": float(rung), "damping": damping * factor},
                state=dict(attempt.state),
            )
        troubles.append(f"{str(precision).removeprefix('torch.')} at damping {damping * factor:.3g}: {trouble}")
    return BlockOutcome(preconditioner=None, outcome=Outcome.FAILED, reason="no rung held: " + "; ".join(troubles))


def _rungs(dtype: torch.dtype, damping_at_apply: bool) -> Iterator[tuple[torch.dtype, float]]:
    """Yields precision and factor of the damping; more damping only where it is part of the inversion."""
    yield dtype, 1.0
    if dtype != torch.float64:
        yield torch.float64, 1.0
    if not damping_at_apply:
        yield from ((torch.float64, factor) for factor in DAMPING_FACTORS)


def _attempt(
    inverter: AbstractInverter, factors: KroneckerFactors, damping: float, previous: Mapping[str, Tensor], seed: int
) -> Inversion:
    try:
        return inverter.invert(factors, damping=damping, previous=previous, seed=seed)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]  # documented, not declared
        return Inversion(preconditioner=None, outcome=Outcome.FAILED, reason=f"LAPACK gave up: {error}")


def _check_shapes(factors: KroneckerFactors) -> None:
    for label, matrix in (("A", factors.A), ("G", factors.G)):
        if matrix.dim() != 3 or matrix.shape[-1] != matrix.shape[-2] or matrix.numel() == 0:
            raise ValueError(f"factor {label} has shape {tuple(matrix.shape)}, must be [c, d, d]")
        if not matrix.is_floating_point():
            raise ValueError(f"factor {label} is {matrix.dtype}, must be floating-point")
    if factors.A.shape[0] != factors.G.shape[0]:
        raise ValueError(f"factor A has {factors.A.shape[0]} groups, G has {factors.G.shape[0]}; must be the same")


def _input_fault(label: str, matrix: Tensor) -> str:
    """Returns what makes a factor no second moment at all, or nothing."""
    bad = int((~matrix.isfinite()).sum())
    if bad:
        return f"factor {label} holds {bad} non-finite of {matrix.numel()} numbers; find the batch that made them"
    relative = float(asymmetry(matrix).max())
    if relative > ASYMMETRY_LIMIT:
        return (
            f"factor {label} is not symmetric: relative difference {relative:.3g}, rounding makes {ASYMMETRY_LIMIT:g}"
        )
    lowest = float(matrix.diagonal(dim1=-2, dim2=-1).min())
    if lowest < 0:
        return f"factor {label} has {lowest:.3g} on its diagonal; sums of squares can't be negative"
    return ""


def _result_fault(attempt: Inversion) -> str:
    """Returns why a result can't be used, or nothing."""
    if attempt.preconditioner is None:
        return attempt.reason or "no result"
    for name, tensor in tensor_fields(attempt.preconditioner).items():
        if not bool(tensor.isfinite().all()):
            return f"{name} of the result is not finite"
    for label in ("A", "G"):
        residual = attempt.diagnostics.get(f"residual_{label}", 0.0)
        if not residual <= RESIDUAL_LIMIT:  # also catches NaN
            return f"factor {label}: residual {residual:.3g}, at most {RESIDUAL_LIMIT:g} is allowed"
    return ""


def _finite(diagnostics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in diagnostics.items() if math.isfinite(value)}
