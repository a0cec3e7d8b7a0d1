"""Every combination of options is right or refused, and the committed table says which."""

from benchmarks.combinations import PAGE, Case, outcome, table, walk, written

MUST_WORK = [
    Case(variant, "empirical", sharing, sampling)
    for variant, sharing, sampling in (
        ("kfac", "expand", "examples_fraction"),
        ("rs-kfac", "reduce", "positions_budget"),
        ("b-kfac", "expand", "all"),
        ('b-kfac, apply_to "rows"', "expand", "all"),
        ("kfac-tridiagonal", "reduce", "all"),
        ("two-level", "expand", "positions_fraction"),
        ("eva", "reduce", "all"),
    )
]


def test_any_combination_is_right_or_refused_and_the_table_says_which() -> None:
    """`outcome` raises where a direction is neither the truth's nor refused with a sentence."""
    outcomes = {case: outcome(case) for case in walk()}
    assert [case for case in MUST_WORK if outcomes[case]] == []
    page = PAGE.read_text(encoding="utf-8")
    assert written(page, table(outcomes)) == page, "run python -m benchmarks.combinations"
