"""CG-FAC against dense matrices (algorithms.md 5.6), its memory, and what it does with rows that are hard."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kfdist.bench.measuring import AllocationCounter
from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverter import Placement
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.inverters.cg_fac import ConjugateGradient
from kfdist.curvature.references import dense_kronecker, factors_of_rows, solve_dense, weighted_fisher
from kfdist.curvature.statistics import Samples
from kfdist.errors import ConfigError
from kfdist.linalg import row_products
from kfdist.linalg.row_products import fisher_diagonal, fisher_product, kronecker_product
from kfdist.types import BlockShape
from kfdist.wire.records import tensor_fields
from tests.support.inversions import travelled
from tests.support.matrices import gaussian, relative_error
from tests.support.samples import make_samples, select

DAMPING = 1e-2
EXACT = {"tolerance": 1e-13, "max_iterations": 400}
P, Q = 4, 5
V = gaussian(2, P, Q, seed=3)

over_operators = pytest.mark.parametrize("operator", ["kronecker", "block"])
over_positions = pytest.mark.parametrize("t", [1, 3])
over_jacobi = pytest.mark.parametrize("jacobi", [False, True], ids=["plain", "jacobi"])


def make(samples: Samples, **settings: object) -> ConjugateGradient:
    inverter = make_inverter("cg-fac", **settings)
    made = inverter.invert(samples, damping=DAMPING, previous={}, seed=0).preconditioner
    assert isinstance(made, ConjugateGradient)
    return made


def dense(samples: Samples, operator: str) -> Tensor:
    """The undamped block on row-major vectors."""
    if operator == "block":
        return weighted_fisher(samples)
    factors = factors_of_rows(samples)
    return dense_kronecker(factors.A, factors.G)


def uneven(t: int, dtype: torch.dtype = torch.float64) -> Samples:
    """Examples of uneven weight, some that only fill up, and positions that aren't all kept."""
    weight = [2.0, 0.0, 1.0, 0.5, 3.0, 0.0, 1.0, 1.0]
    terms = [1.0, 2.5, 1.0, 0.5, 3.0, 1.0, 1.5, 1.0]
    return make_samples(n=8, p=P, q=Q, t=t, weight=weight, terms=terms, positions=float(2 * t - 1), dtype=dtype)


@over_operators
@over_positions
@over_jacobi
def test_CG1_CG2_converged_equals_the_dense_solution(operator: str, t: int, jacobi: bool) -> None:
    samples = uneven(t)
    made = make(samples, operator=operator, jacobi=jacobi, **EXACT)
    assert relative_error(made.apply(V, DAMPING), solve_dense(dense(samples, operator), DAMPING, V)) < 1e-10


@over_positions
def test_CG2_converged_block_equals_woodbury_on_the_gradients(t: int) -> None:
    """SENG's explicit form (algorithms.md 6.2): (1/lambda)(V - U (lambda I + U^T U)^{-1} U^T V), no sketch."""
    samples = uneven(t)
    share = (samples.weight / samples.examples).sqrt()
    U = (torch.einsum("cntp,cntq->cpqn", samples.g, samples.a) * share).flatten(1, 2)
    gram = U.mT @ U + DAMPING * torch.eye(8, dtype=torch.float64)
    v = V.flatten(1).unsqueeze(-1)
    expected = (v - U @ torch.linalg.solve(gram, U.mT @ v)) / DAMPING
    assert relative_error(make(samples, operator="block", **EXACT).apply(V, DAMPING), expected.view_as(V)) < 1e-10


@over_operators
@over_positions
def test_CG3_the_operator_is_symmetric_and_at_least_lambda(operator: str, t: int) -> None:
    samples = uneven(t)
    made = make(samples, operator=operator)
    units = torch.eye(P * Q, dtype=torch.float64).view(P * Q, 1, P, Q).expand(-1, 2, -1, -1)
    matrix = torch.stack([made.product(unit.contiguous(), DAMPING).flatten(1) for unit in units], dim=-1)
    expected = dense(samples, operator) + DAMPING * torch.eye(P * Q, dtype=torch.float64)
    assert relative_error(matrix, expected) < 1e-12
    assert relative_error(matrix, matrix.mT) < 1e-14
    assert float(torch.linalg.eigvalsh(matrix).min()) > DAMPING * (1 - 1e-9)
    torch.testing.assert_close(made.diagonal(DAMPING).flatten(1), expected.diagonal(dim1=1, dim2=2))


@over_operators
@over_jacobi
def test_CG4_the_energy_error_falls_at_every_step(operator: str, jacobi: bool) -> None:
    samples = uneven(2)
    exact = solve_dense(dense(samples, operator), DAMPING, V)
    errors = []
    for steps in range(1, 7):
        made = make(samples, operator=operator, jacobi=jacobi, tolerance=1e-13, max_iterations=steps)
        error = made.apply(V, DAMPING) - exact
        errors.append((error * made.product(error, DAMPING)).sum((1, 2)))
    assert bool((torch.stack(errors).diff(dim=0) < 0).all())


@over_operators
def test_CG5_with_much_damping_the_direction_is_the_gradient_over_lambda(operator: str) -> None:
    made = make(uneven(2), operator=operator)
    assert relative_error(made.apply(V, 1e10) * 1e10, V) < 1e-8


def test_the_block_operator_needs_at_most_one_step_more_than_examples() -> None:
    samples = make_samples(n=6, p=12, q=15, seed=1)
    gradient = gaussian(2, 12, 15, seed=5)
    found = make(samples, operator="block", **EXACT, jacobi=False).solution(gradient, DAMPING)
    limited = make(samples, operator="block", tolerance=1e-9, max_iterations=7).solution(gradient, DAMPING)
    assert bool((limited.residual < 1e-9).all())
    assert relative_error(found.solution, solve_dense(weighted_fisher(samples), DAMPING, gradient)) < 1e-10


@pytest.mark.parametrize(("n", "p", "q"), [(3, 6, 4), (3, 4, 6), (9, 6, 4), (9, 4, 6), (6, 4, 6)])
def test_products_in_every_order(n: int, p: int, q: int) -> None:
    a, g, gradient = gaussian(2, n, q, seed=1), gaussian(2, n, p, seed=2), gaussian(2, p, q, seed=3)
    assert relative_error(kronecker_product(a, g, gradient), g.mT @ g @ gradient @ a.mT @ a) < 1e-13
    a, g = a.unflatten(1, (3, -1)), g.unflatten(1, (3, -1))
    S = torch.einsum("cntp,cntq->cnpq", g, a)
    weights = (S * gradient.unsqueeze(1)).sum((2, 3), keepdim=True)
    assert relative_error(fisher_product(a, g, gradient), (weights * S).sum(1)) < 1e-13


@pytest.mark.parametrize("numbers", [1, 50, 10**6])
def test_the_diagonal_is_the_same_in_chunks(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_products, "CHUNK_NUMBERS", numbers)
    a, g = gaussian(2, 5, 3, Q, seed=1), gaussian(2, 5, 3, P, seed=2)
    assert relative_error(fisher_diagonal(a, g), torch.einsum("cntp,cntq->cnpq", g, a).square().sum(1)) < 1e-13


@over_operators
@pytest.mark.parametrize(
    ("n", "t", "p", "q"), [(5, 1, 70, 90), (5, 1, 90, 70), (200, 1, 70, 90), (10, 11, 70, 90), (3, 2, 90, 70)]
)
@pytest.mark.parametrize("settings", [{}, {"jacobi": True, "warm_start": True}], ids=["plain", "jacobi-warm"])
def test_no_matrix_is_ever_formed(
    operator: str,
    n: int,
    t: int,
    p: int,
    q: int,
    settings: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the rows to the direction: nothing is q x q or p x p, and no more is held than rows and a few gradients."""
    monkeypatch.setattr(row_products, "CHUNK_NUMBERS", 0)
    samples = make_samples(c=1, n=n, t=t, p=p, q=q)
    gradient, memory = gaussian(1, p, q, seed=3), BlockMemory()
    with AllocationCounter() as counter:
        made = make(samples, operator=operator, **settings)
        made.apply(gradient, DAMPING, memory)
        made.apply(gradient, DAMPING, memory)
    sides = {(q, q), (p, p), (p * q, p * q)}
    assert not [shape for shape in counter.shapes if set(itertools.pairwise(shape)) & sides]
    # The rows; 4 p q in the loop, 1 for the last solution, 2 for the diagonal's inverse and what is multiplied by it;
    # and of the rows' size what a product holds between its steps, of which n x n is no more.
    gradients = 7 if settings else 4
    assert counter.peak_bytes <= 8 * ((n * t + 2) * (p + q) + gradients * p * q + 2 * n * t * max(p, q) + n)


@over_operators
@over_positions
def test_rows_that_only_fill_up_do_not_matter(operator: str, t: int) -> None:
    samples = uneven(t)
    spoiled = replace(samples, a=samples.a.clone(), g=samples.g.clone())
    spoiled.a[:, 1], spoiled.g[:, 5] = float("nan"), float("inf")
    kept = samples.weight > 0
    expected = make(select(samples, kept), operator=operator, **EXACT).apply(V, DAMPING)
    assert relative_error(make(spoiled, operator=operator, **EXACT).apply(V, DAMPING), expected) < 1e-10


@over_operators
@over_positions
def test_traces_are_those_of_the_block(operator: str, t: int) -> None:
    samples = uneven(t)
    made = make(samples, operator=operator)
    expected = dense(samples, operator).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(made.trace_A * made.trace_G, expected)
    if operator == "kronecker":
        factors = factors_of_rows(samples)
        torch.testing.assert_close(made.trace_A, factors.A.diagonal(dim1=1, dim2=2).sum(1))
        torch.testing.assert_close(made.trace_G, factors.G.diagonal(dim1=1, dim2=2).sum(1))


def huge_condition() -> Samples:
    samples = make_samples(n=8, p=P, q=Q)
    return replace(samples, a=samples.a * torch.logspace(0, -12, Q, dtype=torch.float64))


HARD = {
    "no-weight": make_samples(n=4, p=P, q=Q, weight=[0.0] * 4),
    "no-rows": make_samples(n=0, p=P, q=Q),
    "zero": replace(make_samples(n=4, p=P, q=Q), a=torch.zeros(2, 4, 1, Q, dtype=torch.float64)),
    "one-sample": make_samples(n=1, p=P, q=Q),
    "huge-condition": huge_condition(),
    "tiny": replace(make_samples(n=4, p=P, q=Q), g=1e-12 * make_samples(n=4, p=P, q=Q).g),
    "large": replace(make_samples(n=4, p=P, q=Q), g=1e6 * make_samples(n=4, p=P, q=Q).g),
}


@over_operators
@over_jacobi
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_hard_rows_stay_finite_and_descend(operator: str, jacobi: bool, kind: str, dtype: torch.dtype) -> None:
    samples = HARD[kind]
    rounded = replace(samples, a=samples.a.to(dtype), g=samples.g.to(dtype), weight=samples.weight.to(dtype))
    direction = make(rounded, operator=operator, jacobi=jacobi).apply(V.to(dtype), DAMPING)
    assert bool(direction.isfinite().all())
    assert bool(((direction * V).sum((1, 2)) > 0).all())
    if kind in ("no-weight", "no-rows", "zero"):
        assert relative_error(direction, V / DAMPING) < 1e-6


@over_operators
def test_trap_g_rows_that_overflow_give_the_scaled_gradient(operator: str) -> None:
    """Not the bare gradient, whose size would be off by lambda + tau."""
    samples = make_samples(n=4, p=P, q=Q, dtype=torch.float32)
    overflowing = replace(samples, a=1e12 * samples.a, g=1e12 * samples.g)
    made = make(overflowing, operator=operator)
    found = made.solution(V.float(), DAMPING)
    assert bool(found.broken.all()) and not bool(found.iterations.any())
    direction = made.apply(V.float(), DAMPING)
    assert torch.equal(direction, made.fallback(V.float(), DAMPING))
    assert relative_error(direction, V) > 0.99


@over_operators
def test_what_is_not_finite_shows_in_the_direction(operator: str) -> None:
    gradient = V.clone()
    gradient[0, 0, 0] = float("nan")
    direction = make(uneven(1), operator=operator).apply(gradient, DAMPING)
    assert not bool(direction[0].isfinite().all()) and bool(direction[1].isfinite().all())
    samples = uneven(1)
    samples.a[0, 0, 0, 0] = float("nan")
    direction = make(samples, operator=operator).apply(V, DAMPING)
    assert not bool(direction[0].isfinite().all()) and bool(direction[1].isfinite().all())


def test_warm_start_goes_on_from_the_last_direction() -> None:
    """Truncated after two steps, it comes nearer in energy from one to the next, which a cold start doesn't."""
    samples = uneven(2)
    exact = solve_dense(dense(samples, "kronecker"), DAMPING, V)
    memory = BlockMemory()
    warm = make(samples, warm_start=True, tolerance=1e-10, max_iterations=2)
    cold = make(samples, warm_start=False, tolerance=1e-10, max_iterations=2)
    first = warm.apply(V, DAMPING, memory)
    assert torch.equal(first, cold.apply(V, DAMPING, memory))
    assert torch.equal(memory.kept["solution"], first)
    energies = []
    for _ in range(10):
        error = memory.kept["solution"] - exact
        energies.append((error * warm.product(error, DAMPING)).sum((1, 2)))
        warm.apply(V, DAMPING, memory)
    assert bool((torch.stack(energies).diff(dim=0) < 0).all())
    assert bool((energies[-1] < 0.5 * energies[0]).all())
    assert warm.keeps_memory
    assert torch.equal(cold.apply(V, DAMPING, memory), first)


@over_operators
def test_inverting_and_applying_read_no_value_back(operator: str) -> None:
    """Fake tensors have no values: reading one raises."""
    mode, samples = FakeTensorMode(), uneven(3)
    rows = replace(samples, **{name: mode.from_tensor(tensor) for name, tensor in tensor_fields(samples).items()})
    with mode:
        made = make(rows, operator=operator, jacobi=True, warm_start=True)
        memory = BlockMemory()
        for _ in range(2):
            assert made.apply(torch.zeros(2, P, Q), DAMPING, memory).shape == V.shape


def test_what_is_kept_is_nobody_elses() -> None:
    """The runtime scales and overwrites directions in place; a rank that was sent one keeps the same."""
    made, solver, other = make(uneven(1), warm_start=True, solve="owner"), BlockMemory(), BlockMemory()
    direction = made.apply(V, DAMPING, solver)
    expected = direction.clone()
    for memory in (solver, other):
        made.receive(direction, memory)
    direction.zero_()
    assert torch.equal(solver.kept["solution"], expected) and torch.equal(other.kept["solution"], expected)
    cold = BlockMemory()
    make(uneven(1), solve="owner").receive(direction, cold)
    assert not cold.kept


def test_tolerance_and_limit_end_it() -> None:
    samples = uneven(2)
    loose = make(samples, tolerance=0.5).solution(V, DAMPING)
    assert bool((loose.residual <= 0.5).all())
    short = make(samples, tolerance=1e-13, max_iterations=3).solution(V, DAMPING)
    assert short.iterations.tolist() == [3, 3]


def test_settings_are_checked() -> None:
    for setting, value in (
        ("operator", "dense"),
        ("tolerance", 0.0),
        ("tolerance", 1),
        ("tolerance", True),
        ("tolerance", float("nan")),
        ("max_iterations", 0),
        ("jacobi", 1),
        ("warm_start", "yes"),
        ("solve", "nowhere"),
        ("examples", 0),
        ("rows", 0),
    ):
        with pytest.raises(ConfigError, match="is not allowed|must be true or false"):
            make_inverter("cg-fac", **{setting: value})


def test_a_record_with_unknown_words_is_refused() -> None:
    made = make(uneven(1))
    with pytest.raises(ValueError, match="operator of conjugate-gradient is 'dense', must be one of kronecker, block"):
        travelled(made, operator="dense")
    with pytest.raises(ValueError, match="solve of conjugate-gradient is 'nobody', must be one of everywhere, owner"):
        travelled(made, solve="nobody")


def test_what_it_asks_of_the_runtime() -> None:
    inverter = make_inverter("cg-fac", examples=32, rows=None)
    needs = inverter.needs(BlockShape(d_out=P, d_in=Q))
    assert not needs.sums and needs.samples is not None
    assert (needs.samples.examples, needs.samples.rows, needs.samples.columns) == (32, None, None)
    assert inverter.placement is Placement.WORKER
    assert not make(uneven(1)).exchanged and make(uneven(1), solve="owner").exchanged
