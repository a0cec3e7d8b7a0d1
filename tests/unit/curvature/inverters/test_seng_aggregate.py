"""SENG over ranks: one operator of all examples, or the average of one per rank (algorithms.md 6.6; check S6)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kfdist.curvature.inverters import Seng, make_inverter
from kfdist.curvature.references import solve_dense, weighted_fisher
from kfdist.curvature.statistics import Samples
from tests.support.matrices import gaussian, relative_error
from tests.support.samples import make_samples, select
from tests.support.seng import dense_operator, direction, from_sources, invert

C, P, Q = 2, 4, 6
DAMPING = 1e-2
V = gaussian(C, P, Q, seed=51)
SOURCES = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3]

both_forms = pytest.mark.parametrize("form", ["explicit", "implicit"])
over_sources = pytest.mark.parametrize(
    "sources", [[0] * 12, SOURCES, [3, 1, 2, 0] * 3, list(range(12)), [0] * 30 + [1] * 26], ids=str
)


def samples(sources: list[int], *, t: int = 2) -> Samples:
    weight = [1.0 + index % 3 for index in range(len(sources))]
    terms = [1.0 + index % 2 for index in range(len(sources))]
    return from_sources(make_samples(n=len(sources), p=P, q=Q, c=C, t=t, seed=5, weight=weight, terms=terms), sources)


def local_average(given: Samples, damping: float = DAMPING) -> Tensor:
    """Mean over the ranks of (F_j + lambda I)^{-1} V, by dense solvers."""
    each = [
        solve_dense(weighted_fisher(select(given, (given.source == rank).nonzero().flatten())), damping, V)
        for rank in given.source.unique()
    ]
    return torch.stack(each).mean(0)


@both_forms
@over_sources
def test_global_is_one_process_on_the_union(form: Any, sources: list[int]) -> None:
    given = samples(sources)
    alone = direction(invert(Seng(form=form), from_sources(given, [0] * len(sources))), V, DAMPING)
    found = direction(invert(Seng(form=form), given), V, DAMPING)
    assert torch.equal(found, alone)
    assert relative_error(found, solve_dense(weighted_fisher(given), DAMPING, V)) <= 1e-10


@both_forms
def test_global_over_4_ranks_holds_whatever_the_order_and_the_filling(form: Any) -> None:
    given = samples(SOURCES)
    shuffled = select(given, torch.randperm(12, generator=torch.Generator().manual_seed(0)))
    padded = replace(
        shuffled,
        a=torch.cat([shuffled.a, gaussian(C, 3, 2, Q, seed=8)], 1),
        g=torch.cat([shuffled.g, gaussian(C, 3, 2, P, seed=9)], 1),
        weight=torch.cat([shuffled.weight, torch.zeros(3, dtype=torch.float64)]),
        terms=torch.cat([shuffled.terms, torch.ones(3, dtype=torch.float64)]),
        source=torch.cat([shuffled.source, torch.tensor([4, 0, 1])]),
        positions=torch.full((15,), 2.0, dtype=torch.float64),
    )
    for aggregate, expected in (
        ("global", solve_dense(weighted_fisher(given), DAMPING, V)),
        ("local-average", local_average(given)),
    ):
        inverter = make_inverter("seng", form=form, aggregate=aggregate)
        assert isinstance(inverter, Seng)
        found = direction(invert(inverter, padded), V, DAMPING)
        assert relative_error(found, expected) <= 1e-10


@both_forms
@over_sources
def test_local_average_is_the_mean_of_the_ranks_directions(form: Any, sources: list[int]) -> None:
    given = samples(sources)
    found = direction(invert(Seng(form=form, aggregate="local-average"), given), V, DAMPING)
    assert relative_error(found, local_average(given)) <= 1e-10


@both_forms
def test_S6_with_identical_data_the_average_is_the_dense_direction(form: Any) -> None:
    own = samples([0] * 5)
    given = replace(
        own,
        a=own.a.repeat(1, 4, 1, 1),
        g=own.g.repeat(1, 4, 1, 1),
        weight=own.weight.repeat(4),
        terms=own.terms.repeat(4),
        positions=own.positions.repeat(4),
        source=torch.arange(4).repeat_interleave(5),
    )
    expected = solve_dense(weighted_fisher(own), DAMPING, V)
    for aggregate in ("global", "local-average"):
        found = direction(invert(Seng(form=form, aggregate=aggregate), given), V, DAMPING)
        assert relative_error(found, expected) <= 1e-10


@both_forms
def test_S6_one_rank_is_the_dense_direction(form: Any) -> None:
    given = samples([0] * 12)
    expected = solve_dense(weighted_fisher(given), DAMPING, V)
    for aggregate in ("global", "local-average"):
        found = direction(invert(Seng(form=form, aggregate=aggregate), given), V, DAMPING)
        assert relative_error(found, expected) <= 1e-10


@both_forms
@over_sources
@pytest.mark.parametrize("damping", [1e-3, 1.0, 1e3])
def test_S6_eigenvalues_of_the_average_are_positive_and_at_most_1_over_lambda(
    form: Any, sources: list[int], damping: float
) -> None:
    operator = dense_operator(invert(Seng(form=form, aggregate="local-average"), samples(sources)), damping)
    assert relative_error(operator, operator.mT) <= 1e-11
    eigenvalues = torch.linalg.eigvalsh((operator + operator.mT) / 2)
    assert float(eigenvalues.min()) > 0
    assert float(eigenvalues.max()) <= (1 + 1e-10) / damping


def test_average_and_global_differ_where_the_ranks_do() -> None:
    given = samples(SOURCES)
    both = [direction(invert(Seng(aggregate=each), given), V, DAMPING) for each in ("global", "local-average")]
    assert relative_error(both[1], both[0]) > 1e-2


def test_mean_field_is_averaged_as_directions() -> None:
    """Not as factors: the product of the ranks' means isn't the mean of their products (algorithms.md 11 b)."""
    given = replace(samples(SOURCES), weight=torch.ones(12, dtype=torch.float64))
    inverter = Seng(form="implicit", back_projection="mean-field", aggregate="local-average")
    each = [
        invert(inverter, select(given, (given.source == rank).nonzero().flatten())).raw_direction(V, 5.0)
        for rank in range(4)
    ]
    assert relative_error(invert(inverter, given).raw_direction(V, 5.0), torch.stack(each).mean(0)) <= 1e-12


@both_forms
def test_each_ranks_sketch_is_its_own_in_the_average(form: Any) -> None:
    given, inverter = samples(SOURCES), Seng(form=form, aggregate="local-average", column_sample_size=2)
    each = [
        invert(inverter, select(given, (given.source == rank).nonzero().flatten())).raw_direction(V, 5.0)
        for rank in range(4)
    ]
    assert relative_error(invert(inverter, given).raw_direction(V, 5.0), torch.stack(each).mean(0)) <= 1e-12
