"""SENG against dense truth: checks S1 to S8 of algorithms.md 6.10, and its approximations by name.

S6, over ranks, is in test_seng_aggregate.py.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverters import CgFac, Seng
from kfdist.curvature.inverters.seng_directions import SengExplicit, SengImplicit
from kfdist.curvature.references import example_gradients, solve_dense, weighted_fisher
from kfdist.curvature.statistics import Samples
from kfdist.linalg.row_products import gram, gram_of_sums, sampled_first
from tests.support.matrices import gaussian, relative_error
from tests.support.samples import make_samples
from tests.support.seng import columns_of, direction, invert, woodbury

C, P, Q, N, T = 2, 5, 8, 9, 3
DAMPING = 1e-2
V = gaussian(C, P, Q, seed=50)
WEIGHT = [1.0, 2.0, 0.5, 1.0, 3.0, 1.0, 1.0, 0.25, 1.0]

both_forms = pytest.mark.parametrize("form", ["explicit", "implicit"])


def samples(*, n: int = N, t: int = T, dtype: torch.dtype = torch.float64) -> Samples:
    return make_samples(n=n, p=P, q=Q, c=C, t=t, seed=3, dtype=dtype, weight=WEIGHT if n == N else None)


def dense(given: Samples, damping: float = DAMPING) -> Tensor:
    return solve_dense(weighted_fisher(given), damping, V)


@both_forms
@pytest.mark.parametrize("t", [1, T])
@pytest.mark.parametrize("n", [1, N, P * Q, 2 * P * Q])
@pytest.mark.parametrize("damping", [1e-4, 1e-2, 10.0])
def test_S1_and_S2_equal_the_dense_solve(form: Any, t: int, n: int, damping: float) -> None:
    given = samples(n=n, t=t)
    found = direction(invert(Seng(form=form), given), V, damping)
    assert relative_error(found, dense(given, damping)) <= 1e-10


def test_S2_implicit_equals_explicit_with_all_columns() -> None:
    given = samples()
    both = [direction(invert(Seng(form=form), given), V, DAMPING) for form in ("explicit", "implicit")]
    assert relative_error(both[1], both[0]) <= 1e-10


def test_S3_gram_identities() -> None:
    given = samples()
    rows = example_gradients(given).flatten(2).transpose(0, 1)
    expected = rows @ rows.mT
    assert relative_error(gram(rows), expected) <= 1e-13
    assert relative_error(gram_of_sums(given.a, given.g), expected) <= 1e-13
    flat = samples(t=1)
    a, g = flat.a[:, :, 0], flat.g[:, :, 0]
    assert relative_error(gram_of_sums(flat.a, flat.g), (a @ a.mT) * (g @ g.mT)) <= 1e-13


def test_S3_gram_of_sums_in_strips_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    given = samples()
    whole = gram_of_sums(given.a, given.g), gram(given.a.flatten(2))
    monkeypatch.setattr("kfdist.linalg.row_products.CHUNK_NUMBERS", 150)
    assert relative_error(gram_of_sums(given.a, given.g), whole[0]) <= 1e-14
    assert relative_error(gram(given.a.flatten(2)), whole[1]) <= 1e-14


@both_forms
def test_S4_a_sample_of_everything_is_no_sketch(form: Any) -> None:
    given = samples()
    for size in (Q, 10 * Q):
        found = direction(invert(Seng(form=form, column_sample_size=size), given), V, DAMPING)
        assert relative_error(found, dense(given)) <= 1e-10


def standard_errors(draws: Tensor, expected: Tensor) -> float:
    """Returns the largest distance of the mean of `[m, ...]` from the truth, in its own standard errors."""
    spread = draws.std(0) / len(draws) ** 0.5
    return float(((draws.mean(0) - expected).abs() / spread).max())


def test_S4_the_sketched_gram_is_unbiased() -> None:
    given, k, draws = samples(), 3, 1000
    rows = example_gradients(given).flatten(2).transpose(0, 1)
    explicit, implicit = [], []
    for seed in range(draws):
        kept = sampled_first(P * Q, k * k, seed=seed, device=rows.device)[: k * k]
        explicit.append(P * Q / k**2 * gram(rows[..., kept]))
        kept_A = sampled_first(Q, k, seed=seed, device=rows.device)[:k]
        kept_G = sampled_first(P, k, seed=draws + seed, device=rows.device)[:k]
        implicit.append(Q / k * P / k * gram_of_sums(given.a[..., kept_A], given.g[..., kept_G]))
    expected = rows @ rows.mT
    # 2 N^2 = 162 dependent estimates; 4.5 standard errors are exceeded by chance once in a thousand such tests.
    assert standard_errors(torch.stack(explicit), expected) < 4.5
    assert standard_errors(torch.stack(implicit), expected) < 4.5


@both_forms
def test_S4_what_the_sketch_is_applied_to_is_unbiased(form: Any) -> None:
    """For large lambda, lambda (v - lambda d) tends to U (s U_S^T v_S), whose mean is F v; the w sum to the trace."""
    given, damping = samples(), 1e6
    inverter = Seng(form=form, column_sample_size=3)
    products, traces = [], []
    for seed in range(400):
        made = invert(inverter, given, seed=seed)
        products.append(damping * (V - damping * direction(made, V, damping)))
        traces.append(made.values.sum(-1))
    F = weighted_fisher(given)
    expected = (F @ V.flatten(1).unsqueeze(-1)).view(V.shape)
    assert standard_errors(torch.stack(products), expected) < 4.5
    assert standard_errors(torch.stack(traces), F.diagonal(dim1=-2, dim2=-1).sum(-1)) < 4.5


@both_forms
@pytest.mark.parametrize("scaling", ["unbiased", "published"])
def test_sketch_equals_its_formula(form: Any, scaling: Any) -> None:
    """The direction of algorithms.md 6.2 for the entries that were drawn; the full U is on the outer side."""
    given, damping = samples(), 5.0
    made = invert(Seng(form=form, column_sample_size=4, scaling=scaling), given, seed=4)
    if isinstance(made, SengExplicit):
        kept = made.order[: made.sampled]
        assert made.sampled == 16
    else:
        assert isinstance(made, SengImplicit)
        rows, columns = made.order_G[: made.sampled_G], made.order_A[: made.sampled_A]
        kept = (rows[:, None] * Q + columns).flatten()
        assert (made.sampled_A, made.sampled_G) == (4, 4)
    U, v = columns_of(given), V.flatten(1).unsqueeze(-1)
    s = P * Q / 16
    if scaling == "published":
        sketched, target = s * U[:, kept], s * v[:, kept]
    else:
        sketched, target = s**0.5 * U[:, kept], s**0.5 * v[:, kept]
    expected = woodbury(U, sketched.mT @ sketched, sketched.mT @ target, damping, V)
    assert relative_error(made.raw_direction(V, damping), expected) <= 1e-10


@both_forms
def test_S5_published_scaling_is_the_unbiased_sketch_with_less_damping(form: Any) -> None:
    given, damping = samples(), 2.0
    scale = P * Q / 16
    published = invert(Seng(form=form, column_sample_size=4, scaling="published"), given)
    unbiased = invert(Seng(form=form, column_sample_size=4), given)
    # U b is the same; what is left is the outer division by lambda.
    expected = unbiased.raw_direction(V, damping / scale) / scale
    assert relative_error(published.raw_direction(V, damping), expected) <= 1e-10
    assert relative_error(unbiased.raw_direction(V, damping), expected) > 1e-2


@both_forms
def test_S7_a_large_damping_leaves_the_gradient(form: Any) -> None:
    made = invert(Seng(form=form, column_sample_size=3), samples())
    errors = [relative_error(damping * direction(made, V, damping), V) for damping in (1e4, 1e6, 1e8)]
    assert errors[0] < 1e-2
    assert errors[1:] == pytest.approx([errors[0] / 100, errors[0] / 10_000], rel=0.05)


def test_S8_equals_cg_fac_on_the_block_operator() -> None:
    given = samples()
    solver = CgFac(operator="block", tolerance=1e-13, max_iterations=200)
    made = solver.invert(given, damping=DAMPING, previous={}, seed=0).preconditioner
    assert made is not None
    found = direction(invert(Seng(form="explicit"), given), V, DAMPING)
    assert relative_error(found, made.apply(V, DAMPING)) <= 1e-10


def test_mean_field_equals_its_formula() -> None:
    """(sum_i |b_i|^{1/2} G_i)(sum_i b_i A_i / sum_i |b_i|^{1/2})^T (algorithms.md 6.3)."""
    given, damping = replace(samples(), weight=torch.ones(N, dtype=torch.float64)), 5.0
    made = invert(Seng(form="implicit", back_projection="mean-field"), given)
    U = columns_of(given)
    x = U.mT @ V.flatten(1).unsqueeze(-1)
    b = torch.linalg.solve(U.mT @ U + damping * torch.eye(N, dtype=torch.float64), x).squeeze(-1)
    expected = torch.empty_like(V)
    for c in range(C):
        g_mean = sum(b[c, i].abs().sqrt() * given.g[c, i] for i in range(N))
        a_mean = sum(b[c, i] * given.a[c, i] for i in range(N)) / b[c].abs().sqrt().sum()
        assert isinstance(g_mean, Tensor)
        expected[c] = (V[c] - g_mean.mT @ a_mean / N**0.5) / damping
    assert relative_error(made.raw_direction(V, damping), expected) <= 1e-10


def test_mean_field_is_exact_where_output_gradients_agree() -> None:
    given = samples(t=1)
    given = replace(given, g=given.g[:, :1].expand_as(given.g), weight=torch.ones(N, dtype=torch.float64))
    made = invert(Seng(form="implicit", back_projection="mean-field"), given)
    assert relative_error(direction(made, V, DAMPING), dense(given)) <= 1e-10


@both_forms
def test_a_direction_that_points_uphill_is_replaced_and_counted(form: Any) -> None:
    inverter, memory = Seng(form=form, column_sample_size=1), BlockMemory()
    replaced = 0
    for seed in range(30):
        made = invert(inverter, samples(), seed=seed)
        raw = made.raw_direction(V, 1e-3)
        uphill = (raw * V).sum((1, 2)) <= 0
        found = made.apply(V, 1e-3, memory)
        expected = torch.where(uphill[:, None, None], made.fallback(V, 1e-3), raw)
        assert torch.equal(found, expected)
        assert bool(((found * V).sum((1, 2)) > 0).all())
        replaced += bool(uphill.any())
        assert int(memory.counts["non_descent"]) == replaced
    assert 0 < replaced < 30


@both_forms
def test_neither_zero_nor_tiny_gradients_count_as_uphill(form: Any) -> None:
    made = invert(Seng(form=form), samples(dtype=torch.float32))
    assert torch.equal(direction(made, torch.zeros_like(V).float(), DAMPING), torch.zeros_like(V).float())
    assert relative_error(direction(made, (1e-30 * V).float(), DAMPING) * 1e30, dense(samples())) <= 1e-3


@both_forms
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_float32_far_below_the_largest_eigenvalue(form: Any, size: float) -> None:
    """lambda is 1e-8 of the largest eigenvalue: the Gram matrix must not be formed in float32."""
    given = replace(samples(), a=size * samples().a)
    damping = float(1e-8 * torch.linalg.eigvalsh(weighted_fisher(given)).max())
    made = invert(Seng(form=form), replace(given, a=given.a.float(), g=given.g.float()))
    truth = replace(given, a=given.a.float().double(), g=given.g.float().double())
    assert relative_error(direction(made, V.float(), damping), dense(truth, damping)) <= 1e-4


@both_forms
def test_the_trace_is_that_of_the_fisher_matrix(form: Any) -> None:
    given = samples()
    trace = weighted_fisher(given).diagonal(dim1=-2, dim2=-1).sum(-1)
    for size in (None, 2):
        made = invert(Seng(form=form, column_sample_size=size), given)
        assert relative_error(made.trace_A * made.trace_G, trace) <= 1e-12
