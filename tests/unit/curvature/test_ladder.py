"""The ladder: which rung holds, what it says, and that faults of the machine aren't rungs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from kfdist.curvature.inverse import AbstractPreconditioner, KroneckerInverse
from kfdist.curvature.inverter import AbstractInverter, Estimate, Inversion, Operation, Outcome, Work
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.ladder import DAMPING_FACTORS, RESIDUAL_LIMIT, _number_fault
from kfdist.curvature.statistics import KroneckerFactors
from kfdist.types import BlockShape
from tests.support.inversions import invert_with_ladder
from tests.support.matrices import gaussian, make_factors, relative_error, with_spectrum

V = gaussian(2, 7, 12, seed=3)


@dataclass(frozen=True, kw_only=True)
class Scripted(AbstractInverter):
    """Inverts with K-FAC and lets a test spoil the attempts, by precision and damping."""

    name: ClassVar[str] = "scripted"
    produces: ClassVar[type[AbstractPreconditioner]] = KroneckerInverse

    spoil: Callable[[Inversion, torch.dtype, float], Inversion] = lambda inversion, dtype, damping: inversion
    attempts: list[tuple[torch.dtype, float]] = field(default_factory=list)

    def invert(
        self, factors: KroneckerFactors, *, damping: float, previous: Mapping[str, Tensor], seed: int
    ) -> Inversion:
        self.attempts.append((factors.A.dtype, damping))
        inversion = make_inverter("kfac").invert(factors, damping=damping, previous=previous, seed=seed)
        return self.spoil(inversion, factors.A.dtype, damping)

    def estimate(self, shape: BlockShape) -> Estimate:
        return Estimate([Work(Operation.CHOLESKY, 1.0)], 1)


def run(inverter: AbstractInverter, factors: KroneckerFactors, damping: float = 1e-2):
    return invert_with_ladder(inverter, factors, damping=damping, previous={}, seed=0)


def test_float32_is_enough_for_ordinary_factors() -> None:
    outcome = run(make_inverter("kfac"), make_factors("decaying", torch.float32))
    assert (outcome.outcome, outcome.reason, outcome.diagnostics["rung"]) == (Outcome.DONE, "", 0)


def test_an_ill_conditioned_inverse_is_made_in_float64() -> None:
    factors = make_factors("huge-condition", torch.float32)
    outcome = run(make_inverter("kfac"), factors, damping=1e-13)
    assert outcome.outcome is Outcome.FLOAT64
    assert outcome.reason.startswith("float32 at damping 1e-13: factor A: residual")
    made = outcome.preconditioner
    assert isinstance(made, KroneckerInverse) and made.A_inverse.dtype == torch.float32
    damped = factors.A.double() + made.damping_A.double()[:, None, None] * torch.eye(12)
    assert relative_error(made.A_inverse, torch.linalg.inv(damped)) < 1e-5  # rounded to float32 at the end


def test_damping_below_the_rounding_of_the_factors_is_raised() -> None:
    outcome = run(make_inverter("kfac"), make_factors("huge-condition", torch.float32), damping=1e-16)
    assert outcome.outcome is Outcome.MORE_DAMPING


def test_an_indefinite_factor_takes_as_much_damping_as_it_needs() -> None:
    values = torch.linspace(2, 0.5, 12, dtype=torch.float64).repeat(2, 1)
    values[:, -1] = -0.4
    A = with_spectrum(values, seed=1)
    factors = KroneckerFactors(A=A, G=make_factors("well-conditioned", torch.float64).G)
    outcome = run(make_inverter("kfac"), factors)
    assert outcome.outcome is Outcome.MORE_DAMPING
    assert outcome.diagnostics["damping"] == 1e-2 * DAMPING_FACTORS[1]
    assert "is not positive definite" in outcome.reason and "at damping 0.1" in outcome.reason
    assert isinstance(outcome.preconditioner, KroneckerInverse)
    torch.testing.assert_close(outcome.preconditioner.joint_damping(1e-2), torch.ones(2).double())


def test_the_rungs_come_in_order_and_end_in_failure() -> None:
    hopeless = Scripted(spoil=lambda i, dtype, damping: Inversion(preconditioner=None, reason="spoiled"))
    outcome = run(hopeless, make_factors("decaying", torch.float32), damping=0.5)
    expected = [(torch.float32, 0.5), (torch.float64, 0.5), *((torch.float64, 0.5 * f) for f in DAMPING_FACTORS)]
    assert hopeless.attempts == expected
    assert outcome.outcome is Outcome.FAILED and outcome.preconditioner is None
    assert outcome.reason.startswith("no rung held: float32 at damping 0.5: spoiled; float64 at damping 0.5")
    in_float64 = Scripted(spoil=hopeless.spoil)
    run(in_float64, make_factors("decaying", torch.float64), damping=0.5)
    assert in_float64.attempts == expected[1:]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_result_is_never_used(value: float) -> None:
    def spoil(inversion: Inversion, dtype: torch.dtype, damping: float) -> Inversion:
        if dtype == torch.float64 or not isinstance(inversion.preconditioner, KroneckerInverse):
            return inversion
        bad = inversion.preconditioner.A_inverse.clone()
        bad[1, 3, 3] = value
        return replace(inversion, preconditioner=replace(inversion.preconditioner, A_inverse=bad))

    outcome = run(Scripted(spoil=spoil), make_factors("decaying", torch.float32))
    assert outcome.outcome is Outcome.FLOAT64
    assert "A_inverse of the result is not finite" in outcome.reason


@pytest.mark.parametrize("residual", [2 * RESIDUAL_LIMIT, float("nan")])
def test_a_large_residual_is_never_used(residual: float) -> None:
    def spoil(inversion: Inversion, dtype: torch.dtype, damping: float) -> Inversion:
        if dtype == torch.float64:
            return inversion
        return replace(inversion, diagnostics={**inversion.diagnostics, "residual_G": residual})

    outcome = run(Scripted(spoil=spoil), make_factors("decaying", torch.float32))
    assert outcome.outcome is Outcome.FLOAT64
    assert "factor G: residual" in outcome.reason


def test_a_lapack_failure_is_a_rung_but_a_fault_of_the_machine_is_not() -> None:
    def raising(error: Exception) -> Scripted:
        def spoil(inversion: Inversion, dtype: torch.dtype, damping: float) -> Inversion:
            if dtype == torch.float32:
                raise error
            return inversion

        return Scripted(spoil=spoil)

    lapack = torch.linalg.LinAlgError("did not converge")  # pyright: ignore[reportPrivateImportUsage]
    outcome = run(raising(lapack), make_factors("decaying", torch.float32))
    assert outcome.outcome is Outcome.FLOAT64 and "LAPACK gave up: did not converge" in outcome.reason
    with pytest.raises(RuntimeError, match="out of memory"):
        run(raising(RuntimeError("out of memory")), make_factors("decaying", torch.float32))


@pytest.mark.parametrize("method", ["kfac-eigen", "rs-kfac"])
def test_damping_at_apply_never_climbs_to_more_damping(method: str) -> None:
    outcome = run(make_inverter(method), make_factors("indefinite", torch.float32))
    assert outcome.outcome is Outcome.CLAMPED
    assert outcome.diagnostics["damping"] == 1e-2


def test_half_precision_factors_are_inverted_in_float32() -> None:
    factors = make_factors("well-conditioned", torch.bfloat16)
    outcome = run(make_inverter("kfac-eigen"), factors)
    assert outcome.preconditioner is not None
    assert outcome.preconditioner.trace_A.dtype == torch.float32
    exact = run(make_inverter("kfac-eigen"), make_factors("well-conditioned", torch.float64)).preconditioner
    assert exact is not None
    assert relative_error(outcome.preconditioner.apply(V, 1e-2), exact.apply(V, 1e-2)) < 0.05  # bfloat16 input


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan"), float("inf")])
def test_a_damping_that_is_none_is_refused(damping: float) -> None:
    with pytest.raises(ValueError, match="must be finite and positive"):
        run(make_inverter("kfac"), make_factors("decaying", torch.float32), damping=damping)


@pytest.mark.parametrize(
    ("shape_A", "shape_G", "message"),
    [
        ((3, 4, 5), (3, 2, 2), r"factor A has shape \(3, 4, 5\)"),
        ((4, 4), (1, 2, 2), r"factor A has shape \(4, 4\)"),
        ((2, 4, 4), (3, 2, 2), "factor A has 2 groups, G has 3"),
        ((2, 4, 4), (2, 0, 0), r"factor G has shape \(2, 0, 0\)"),
    ],
)
def test_wrong_shapes_are_refused(shape_A: tuple[int, ...], shape_G: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(make_inverter("kfac"), KroneckerFactors(A=torch.zeros(shape_A), G=torch.zeros(shape_G)))


def test_reasons_name_the_fault() -> None:
    expected = {
        "nan": "factor A holds 2 non-finite of 288 numbers",
        "asymmetric": "factor A is not symmetric: relative difference 0.",
        "negative-diagonal": "factor A has -0.1 on its diagonal",
    }
    for spectrum, reason in expected.items():
        assert run(make_inverter("kfac"), make_factors(spectrum, torch.float32)).reason.startswith(reason)


def test_every_outcome_has_a_message() -> None:
    assert all(outcome.message.endswith(".") for outcome in Outcome)
    assert Outcome("float64") is Outcome.FLOAT64
    assert Outcome.worst(Outcome.DONE, Outcome.CLAMPED, Outcome.FLOAT64) is Outcome.CLAMPED


def test_finite_numbers_whose_sum_is_not_are_finite() -> None:
    large = 3e38 * torch.ones(1, 3)
    assert _number_fault("rows", large) == ""
    large[0, 1] = torch.nan
    assert _number_fault("rows", large).startswith("rows holds 1 non-finite of 3 numbers")
