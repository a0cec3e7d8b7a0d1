"""What every inversion method must do, over generated spectra and precisions; see `tests.support.cases`."""

import functools
import hashlib
import inspect
import json
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

import kfdist
from kfdist.curvature import inverters
from kfdist.curvature.inverse import KroneckerInverse
from kfdist.curvature.inverter import AbstractInverter, Inversion, Outcome, Placement
from kfdist.curvature.inverters import FIXED, INVERTERS, make_inverter
from kfdist.curvature.jobs import decode_result, encode_job, encode_result, run_job
from kfdist.curvature.ladder import RESIDUAL_LIMIT
from kfdist.types import BlockShape
from kfdist.wire.records import tensor_fields
from tests.support.captured_methods import CAPTURED
from tests.support.cases import CASES, DAMPING, TOLERANCE, InverterCase
from tests.support.inversions import invert_with_ladder
from tests.support.matrices import GOOD, C, P, Q, gaussian, make_factors, relative_error

SEED = 5

ORTHOGONALITY = {torch.float64: 1e-13, torch.float32: 2e-5}
"""||U^T U - I||, Frobenius: a few units of rounding for each of at most 84 columns."""

DTYPES = [torch.float32, torch.float64]
V = gaussian(C, P, Q, seed=3)

HELPERS = {"seng_directions"}
"""Modules of `inverters/` that hold half a method."""

Check = Callable[..., None]


def over(name: str, values: Callable[[InverterCase], Iterable[Any]]) -> Callable[[Check], Check]:
    """Has a test go through the values of one argument by itself; a failure says at which.

    To collect and report a test each would take longer than most of these checks.
    """

    def decorate(check: Check) -> Check:
        @functools.wraps(check)
        def through_all(*, case: InverterCase, **given: Any) -> None:
            for value in values(case):
                try:
                    check(case=case, **{name: value}, **given)
                except BaseException as error:
                    error.add_note(f"with {name} = {value!r}")
                    raise

        signature = inspect.signature(check)
        left = [parameter for parameter in signature.parameters.values() if parameter.name != name]
        through_all.__signature__ = signature.replace(parameters=left)  # pyright: ignore[reportAttributeAccessIssue]
        return through_all

    return decorate


over_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
over_good = over("spectrum", lambda _: GOOD)
over_dtypes = over("dtype", lambda _: DTYPES)


_inverted: dict[tuple[str, str, torch.dtype, float], Inversion] = {}
"""Most checks look at the same inversions."""


def invert(case: InverterCase, spectrum: str, dtype: torch.dtype, damping: float = DAMPING) -> Inversion:
    key = (case.id, spectrum, dtype, damping)
    if key not in _inverted:
        statistics = case.statistics(make_factors(spectrum, dtype))
        _inverted[key] = invert_with_ladder(case.make(), statistics, damping=damping, previous={}, seed=SEED)
    return _inverted[key]


def applied(outcome: Inversion, gradient: Tensor, damping: float = DAMPING) -> Tensor:
    assert outcome.preconditioner is not None, outcome.reason
    return outcome.preconditioner.apply(gradient, damping)


def job(case: InverterCase, spectrum: str, dtype: torch.dtype) -> bytes:
    return encode_job(
        inverter=case.make(),
        statistics={"block": case.statistics(make_factors(spectrum, dtype))},
        damping=DAMPING,
        seeds={"block": SEED},
        previous={},
        threads=1,
    )


@over_cases
@over_good
@over_dtypes
def test_keeps_shape_and_dtype(case: InverterCase, spectrum: str, dtype: torch.dtype) -> None:
    outcome = invert(case, spectrum, dtype)
    assert outcome.preconditioner is not None, outcome.reason
    tensors = tensor_fields(outcome.preconditioner).values()
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {dtype}
    assert outcome.preconditioner.shape == (C, P, Q)
    direction = applied(outcome, V.to(dtype))
    assert direction.shape == V.shape
    assert direction.dtype == dtype
    assert isinstance(outcome.preconditioner, case.make().produces)


@over_cases
@over_good
@over_dtypes
def test_acts_as_a_symmetric_positive_matrix(case: InverterCase, spectrum: str, dtype: torch.dtype) -> None:
    outcome = invert(case, spectrum, dtype)
    other = gaussian(C, P, Q, seed=4)
    found, mirrored = applied(outcome, V.to(dtype)).double(), applied(outcome, other.to(dtype)).double()
    scale = float(found.norm() * other.norm())
    assert abs(float((found * other).sum() - (mirrored * V).sum())) <= TOLERANCE[dtype] * scale
    assert (found * V).sum((1, 2)).min() > 0


@over_cases
@over("spectrum", lambda case: case.spectra)
@over_dtypes
def test_equals_its_reference(case: InverterCase, spectrum: str, dtype: torch.dtype) -> None:
    factors = make_factors(spectrum, dtype)
    expected = case.reference(factors, DAMPING, V)
    assert relative_error(applied(invert(case, spectrum, dtype), V.to(dtype)), expected) <= TOLERANCE[dtype]


@over_cases
@over_dtypes
def test_damping_is_lambda_of_the_whole_block(case: InverterCase, dtype: torch.dtype) -> None:
    """lambda times the direction tends to the gradient as lambda grows."""
    errors = []
    for damping in (1e4, 1e8, 1e12):
        outcome = invert(case, "well-conditioned", dtype, damping)
        direction = applied(outcome, V.to(dtype), damping)
        scale = damping if case.damping_is_lambda else _joint(outcome, damping)
        errors.append(relative_error(direction * scale, V))
    # A factored damping of gamma = sqrt(lambda) leaves an error of w_max / gamma.
    assert errors[0] > errors[1] and errors[2] < 1e-5


def _joint(outcome: Inversion, damping: float) -> Tensor:
    assert outcome.preconditioner is not None
    return outcome.preconditioner.joint_damping(damping)[:, None, None]


@over_cases
@over_good
def test_fallback_has_the_size_of_the_mean_eigenvalue(case: InverterCase, spectrum: str) -> None:
    outcome = invert(case, spectrum, torch.float64)
    factors = case.stands_for(make_factors(spectrum, torch.float64))
    assert outcome.preconditioner is not None, outcome.reason
    tau = torch.stack([a.trace() * g.trace() / (P * Q) for a, g in zip(factors.A, factors.G, strict=True)])
    joint = (
        torch.full((C,), DAMPING, dtype=torch.float64) if case.damping_is_lambda else _joint(outcome, DAMPING).flatten()
    )
    expected = V / (joint + tau)[:, None, None]
    assert relative_error(outcome.preconditioner.fallback(V, DAMPING), expected) <= TOLERANCE[torch.float64]


@over_cases
@over("spectrum", lambda case: case.bad)
@over_dtypes
@over("both", lambda _: (True, False))
def test_says_what_became_of_bad_input(case: InverterCase, dtype: torch.dtype, spectrum: str, both: bool) -> None:
    statistics = case.statistics(make_factors(spectrum, dtype, good_G=not both))
    outcome = invert_with_ladder(case.make(), statistics, damping=DAMPING, previous={}, seed=SEED)
    expected = case.indefinite if spectrum == "indefinite" else Outcome.FAILED
    assert outcome.outcome is expected, outcome.reason
    if expected is Outcome.FAILED:
        assert outcome.preconditioner is None
        assert any(words in outcome.reason for words in ("factor A", "A_rows holds", "a holds"))
    else:
        direction = applied(outcome, V.to(dtype))
        assert bool(direction.isfinite().all())
        assert (direction * V).sum() > 0


@over_cases
@over_good
@over_dtypes
def test_says_how_good_it_is(case: InverterCase, spectrum: str, dtype: torch.dtype) -> None:
    found = invert(case, spectrum, dtype).diagnostics
    assert case.diagnostics | {"rung", "damping"} <= found.keys()
    assert (case.make().placement is Placement.WORKER) == (not case.diagnostics)
    assert found["damping"] == DAMPING
    for name in case.diagnostics:
        kind, _, label = name.rpartition("_")
        if kind == "residual":
            assert 0 <= found[name] <= RESIDUAL_LIMIT
        elif kind == "orthogonality":
            assert 0 <= found[name] <= ORTHOGONALITY[dtype]
        elif kind == "rank":
            assert 0 <= found[name] <= {"A": Q, "G": P, "gram": P * Q}[label]


@over_cases
@over_dtypes
def test_its_smallest_eigenvalue_is_that_of_what_it_keeps(case: InverterCase, dtype: torch.dtype) -> None:
    """Both generated factors have eigenvalues from 1/2 to 2, so their product has them from 1/4."""
    found = invert(case, "well-conditioned", dtype).diagnostics
    for label, whole, least in (("A", Q, 0.5), ("G", P, 0.5), ("gram", P * Q, 0.25)):
        name = f"smallest_eigenvalue_{label}"
        if name not in case.diagnostics:
            continue
        assert found[name] >= 0.99 * least
        if found[f"rank_{label}"] == whole:  # by power iteration, in some methods
            assert found[name] <= 1.05 * least


@pytest.mark.parametrize("case", [c for c in CASES if c.make().placement is Placement.WORKER], ids=lambda case: case.id)
@over_good
@over_dtypes
def test_what_the_ranks_invert_themselves_needs_no_ladder(
    case: InverterCase, spectrum: str, dtype: torch.dtype
) -> None:
    """They call `invert` directly, so what it returns at once must be what the ladder would have passed."""
    statistics = case.statistics(make_factors(spectrum, dtype))
    direct = case.make().invert(statistics, damping=DAMPING, previous={}, seed=SEED)
    passed = invert(case, spectrum, dtype)
    assert direct.outcome is passed.outcome is Outcome.DONE and passed.diagnostics["rung"] == 0
    assert direct.preconditioner is not None and passed.preconditioner is not None
    expected = tensor_fields(passed.preconditioner)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensor_fields(direct.preconditioner).items())


@over_cases
def test_depends_on_its_arguments_alone(case: InverterCase) -> None:
    statistics = case.statistics(make_factors("decaying", torch.float32))
    before = {name: tensor.clone() for name, tensor in tensor_fields(statistics).items()}
    results = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        outcome = invert_with_ladder(case.make(), statistics, damping=DAMPING, previous={}, seed=SEED)
        assert torch.equal(torch.get_rng_state(), state)
        assert outcome.preconditioner is not None
        results.append(tensor_fields(outcome.preconditioner))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert all(torch.equal(before[name], tensor) for name, tensor in tensor_fields(statistics).items())


@over_cases
@over_dtypes
def test_travels_whole(case: InverterCase, dtype: torch.dtype) -> None:
    """Through the wire and back, nothing changes by a bit."""
    direct = invert(case, "decaying", dtype)
    result = run_job(job(case, "decaying", dtype))
    arrived = decode_result(result).outcomes["block"]
    assert direct.preconditioner is not None and arrived.preconditioner is not None
    assert type(arrived.preconditioner) is type(direct.preconditioner)
    expected, found = tensor_fields(direct.preconditioner), tensor_fields(arrived.preconditioner)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (arrived.outcome, arrived.reason, arrived.diagnostics) == (direct.outcome, direct.reason, direct.diagnostics)
    assert torch.equal(applied(arrived, V.to(dtype)), applied(direct, V.to(dtype)))
    assert encode_result({"block": arrived.preconditioner}, {"block": arrived}) == result


_FRESH = """
import hashlib, json, sys, torch
from kfdist.curvature.jobs import run_job
torch.set_num_threads(1)
payloads = json.load(sys.stdin)
print(json.dumps([hashlib.sha256(run_job(bytes.fromhex(payload))).hexdigest() for payload in payloads]))
"""


@pytest.mark.parametrize(
    "good", [[*GOOD][:1], pytest.param([*GOOD][1:], marks=pytest.mark.slow)], ids=["one spectrum", "the others"]
)
def test_same_bytes_from_a_fresh_process(good: list[str]) -> None:
    """A new process does every job again, in reverse order: what it did before must not matter."""
    torch.set_num_threads(1)
    payloads = [
        job(case, spectrum, dtype)
        for case in CASES
        for spectrum in [*good, *(bad for bad in ("nan", "indefinite") if bad in case.bad)]
        for dtype in DTYPES
    ]
    here = [hashlib.sha256(run_job(payload)).hexdigest() for payload in payloads]
    backwards = json.dumps([payload.hex() for payload in reversed(payloads)])
    fresh = subprocess.run(
        [sys.executable, "-c", _FRESH], input=backwards, capture_output=True, text=True, check=True, timeout=100
    )
    assert json.loads(fresh.stdout)[::-1] == here


@over_cases
def test_its_settings_make_it_again(case: InverterCase) -> None:
    inverter = case.make()
    settings = json.loads(json.dumps(inverter.settings()))
    assert make_inverter(inverter.name, **settings) == inverter
    assert settings.keys() == {field.name for field in fields(inverter)}


@over_cases
def test_cost_grows_with_the_block(case: InverterCase) -> None:
    inverter = case.make()
    small, large = BlockShape(d_out=64, d_in=65), BlockShape(d_out=512, d_in=513)
    assert 0 < inverter.cost(small) < inverter.cost(large)
    assert inverter.cost(BlockShape(d_out=64, d_in=65, groups=3)) == pytest.approx(3 * inverter.cost(small))


@over_cases
def test_a_result_is_no_larger_than_estimated(case: InverterCase) -> None:
    outcome = invert(case, "decaying", torch.float64)
    made = outcome.preconditioner
    assert made is not None
    numbers = sum(each.numel() for each in (*tensor_fields(made).values(), *outcome.state.values()))
    few = 8 * (C + P + Q)  # traces, dampings, eigenvalues
    estimated = case.make().estimate(BlockShape(d_out=P, d_in=Q, groups=C)).numbers
    assert numbers <= C * estimated + few


def test_a_method_of_the_workers_that_needs_the_damping_is_refused() -> None:
    with pytest.raises(TypeError, match="Undamped is placed on the workers, .* KroneckerInverse isn't damped at apply"):

        class Undamped(AbstractInverter):  # pyright: ignore[reportUnusedClass]
            name = "undamped"
            produces = KroneckerInverse
            placement = Placement.WORKER


def test_every_method_is_in_the_table_and_every_entry_has_a_case() -> None:
    modules = {module.name for module in pkgutil.iter_modules(inverters.__path__)} - HELPERS
    tabled = {cls.__module__.rpartition(".")[2] for cls in {**INVERTERS, **FIXED}.values()}
    assert modules == tabled
    assert {case.name for case in CASES} == set(CAPTURED)
    assert all(name == cls.name for name, cls in INVERTERS.items())
    assert all(issubclass(cls, AbstractInverter) for cls in INVERTERS.values())
    assert all(getattr(kfdist, cls.__name__) is cls for cls in INVERTERS.values())
