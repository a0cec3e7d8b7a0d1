"""SENG: settings, what it says it does, and samples that no Fisher matrix can be made of."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from kfdist.curvature.inverter import Inversion, Outcome
from kfdist.curvature.inverters import Seng, make_inverter
from kfdist.curvature.inverters.seng_directions import SengExplicit, SengImplicit
from kfdist.curvature.statistics import Samples
from kfdist.errors import ConfigError
from kfdist.types import BlockShape
from tests.support.inversions import invert_with_ladder, travelled
from tests.support.matrices import gaussian, relative_error
from tests.support.samples import make_samples

C, P, Q, N = 2, 4, 6, 7
V = gaussian(C, P, Q, seed=52)

both_forms = pytest.mark.parametrize("form", ["explicit", "implicit"])
over_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def run(form: Any, given: Samples, **settings: Any) -> Inversion:
    return invert_with_ladder(Seng(form=form, **settings), given, damping=1e-2, previous={}, seed=0)


def samples(dtype: torch.dtype = torch.float64) -> Samples:
    return make_samples(n=N, p=P, q=Q, c=C, t=2, seed=6, dtype=dtype)


@both_forms
@over_dtypes
@pytest.mark.parametrize("field", ["a", "g", "weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_non_finite_rows_fail_by_name(form: Any, dtype: torch.dtype, field: str, value: float) -> None:
    given = samples(dtype)
    spoiled = getattr(given, field).clone()
    spoiled.view(-1)[3] = value
    outcome = run(form, replace(given, **{field: spoiled}))
    assert outcome.outcome is Outcome.FAILED
    assert outcome.reason.startswith(f"{field} holds 1 non-finite of")


@both_forms
def test_weights_that_count_nothing_fail(form: Any) -> None:
    given = samples()
    outcome = run(form, replace(given, weight=torch.zeros(N, dtype=torch.float64)))
    assert outcome.outcome is Outcome.FAILED
    assert "no samples: weight is 0 for all 7 examples" in outcome.reason
    weight = torch.tensor([1.0, -0.5, *[1.0] * 5], dtype=torch.float64)
    outcome = run(form, replace(given, weight=weight))
    assert outcome.outcome is Outcome.FAILED
    assert "weight holds -0.5; an example can't count less than 0 times" in outcome.reason


@both_forms
@over_dtypes
@pytest.mark.parametrize("aggregate", ["global", "local-average"])
@pytest.mark.parametrize("size", [None, 2])
def test_rows_of_zeros_leave_the_gradient_over_lambda(form: Any, dtype: torch.dtype, aggregate: str, size: Any) -> None:
    given = samples(dtype)
    zeros = replace(given, g=torch.zeros_like(given.g), source=torch.arange(N) % 3)
    outcome = run(form, zeros, aggregate=aggregate, column_sample_size=size)
    assert outcome.preconditioner is not None, outcome.reason
    assert outcome.diagnostics["rank_gram"] == outcome.diagnostics["smallest_eigenvalue_gram"] == 0
    assert relative_error(outcome.preconditioner.apply(V.to(dtype), 1e-2), 100 * V) <= 1e-6
    assert relative_error(outcome.preconditioner.fallback(V.to(dtype), 1e-2), 100 * V) <= 1e-6


def test_auto_goes_by_the_entries() -> None:
    for threshold, kind in ((P * Q, SengExplicit), (P * Q - 1, SengImplicit)):
        outcome = run("auto", samples(), threshold=threshold)
        assert type(outcome.preconditioner) is kind


def test_it_says_what_it_does() -> None:
    small, large = BlockShape(d_out=100, d_in=738), BlockShape(d_out=1000, d_in=2049)
    assert Seng().note(small) == "explicit"
    assert Seng(column_sample_size=64).note(small) == "explicit, sketched 4096 of 73800 entries"
    assert Seng(column_sample_size=64).note(large) == "implicit, sketched 4096 of 2049000 entries"
    assert Seng(back_projection="mean-field").note(small) == "explicit"
    assert Seng(back_projection="mean-field").note(large) == "implicit, mean-field back-projection"
    assert Seng(aggregate="local-average").note(small) == "explicit, average of the ranks' own operators"


def test_it_wants_samples_and_no_sums() -> None:
    needs = Seng(examples=32, columns=8).needs(BlockShape(d_out=3, d_in=4))
    assert (needs.sums, needs.increments) == (frozenset(), frozenset())
    assert needs.samples is not None
    assert (needs.samples.examples, needs.samples.columns, needs.samples.rows) == (32, 8, None)


@pytest.mark.parametrize(
    ("settings", "path", "message"),
    [
        ({"examples": 0}, "examples", "0 is not allowed; must be a whole number of at least 1"),
        ({"columns": 0}, "columns", "0 is not allowed"),
        ({"column_sample_size": 1.5}, "column_sample_size", "1.5 is not allowed"),
        ({"threshold": -1}, "threshold", "-1 is not allowed"),
        ({"form": "dense"}, "form", "choose one of 'auto', 'explicit', 'implicit'"),
        ({"scaling": "biased"}, "scaling", "choose one of 'unbiased', 'published'"),
        ({"back_projection": "none"}, "back_projection", "choose one of 'exact', 'mean-field'"),
        ({"aggregate": "block-diagonal"}, "aggregate", "choose one of 'global', 'local-average'"),
        ({"form": "explicit", "back_projection": "mean-field"}, "back_projection", "use form 'auto' or 'implicit'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        make_inverter("seng", **settings)
    assert error.value.path == path


@pytest.mark.parametrize("field", ["scaling", "back_projection"])
def test_a_record_with_an_unknown_word_is_refused(field: str) -> None:
    made = run("implicit", samples()).preconditioner
    assert isinstance(made, SengImplicit)
    with pytest.raises(ValueError, match=f"{field} of seng-implicit is 'other', must be one of"):
        travelled(made, **{field: "other"})
