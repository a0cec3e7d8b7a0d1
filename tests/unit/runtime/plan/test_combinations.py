"""Every combination of options is right or refused, and the committed table says which."""

from itertools import islice

import pytest

from benchmarks.combinations import PAGE, Case, outcome, table, walk, written

MUST_WORK = [
    Case("kfac", "empirical", "expand", "examples_fraction"),
    Case("rs-kfac", "empirical", "reduce", "positions_budget"),
    Case("b-kfac", "empirical", "expand", "all"),
    Case('b-kfac, apply_to "rows"', "empirical", "expand", "all"),
    Case("kfac-tridiagonal", "empirical", "reduce", "all"),
    Case("two-level", "empirical", "expand", "positions_fraction"),
    Case("eva", "empirical", "reduce", "all"),
]


def test_what_must_work_does_and_of_the_others_every_fifth_is_right_or_refused() -> None:
    """`outcome` raises where a direction is neither the truth's nor refused with a sentence."""
    outcomes = {case: outcome(case) for case in [*islice(walk(), 0, None, 5), *MUST_WORK]}
    assert [case for case in MUST_WORK if outcomes[case]] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_any_combination_is_right_or_refused_and_the_table_says_which() -> None:
    outcomes = {case: outcome(case) for case in walk()}
    page = PAGE.read_text(encoding="utf-8")
    assert written(page, table(outcomes)) == page, "run python -m benchmarks.combinations"
