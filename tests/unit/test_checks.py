"""Refusals name the value received, what is allowed, and where it was given."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from kfdist import checks
from kfdist.errors import ConfigError


def refusal(check: Callable[..., Any], value: object, **bounds: Any) -> ConfigError:
    with pytest.raises(ConfigError) as refused:
        check("section.field", value, **bounds)
    assert refused.value.path == "section.field"
    return refused.value


def test_plain_numbers():
    assert checks.is_number(1) and checks.is_number(0.5) and checks.is_number(math.inf)
    assert not any(checks.is_number(value) for value in (True, "1", None, 1j))
    assert checks.is_whole(-1)
    assert not any(checks.is_whole(value) for value in (False, 1.0, "1", None))


@pytest.mark.parametrize(
    ("bounds", "fitting", "wrong", "rule"),
    [
        ({}, [0, -1.5], [math.inf, math.nan], "a finite number"),
        ({"above": 0}, [1e-300, 7], [0, 0.0, -1, math.inf, math.nan], "a finite number above 0"),
        ({"least": 0}, [0, 0.5], [-1e-9, math.nan], "a finite number of at least 0"),
        ({"above": 0, "below": 1}, [0.5], [0, 1, math.nan], "a number above 0 and below 1"),
        ({"least": 0, "below": 1}, [0, 0.9], [1.0, -0.1], "a number of at least 0 and below 1"),
        ({"above": 0, "most": 1}, [1, 1e-9], [0, 1.1, math.inf], "a number above 0 and at most 1"),
        ({"least": 0, "most": 1}, [0, 1], [-0.1, 1.1], "a number of at least 0 and at most 1"),
        ({"least": 1e-8, "finite": False}, [math.inf, 1], [0, math.nan], "a number of at least 1e-08"),
    ],
)
def test_numbers_within_bounds(bounds: dict[str, Any], fitting: list[float], wrong: list[float], rule: str):
    for value in fitting:
        assert checks.number("field", value, **bounds) is value
    for value in (*wrong, True, "1", None, [0.5]):
        error = refusal(checks.number, value, **bounds)
        assert str(error) == f"section.field: {value!r} is not allowed; must be {rule}"


def test_counts():
    assert checks.count("field", 1, least=1) == 1
    for value in (0, -3, 1.0, True, "2", None):
        error = refusal(checks.count, value, least=1, hint="or None for no limit")
        assert str(error).endswith(
            f": {value!r} is not allowed; must be a whole number of at least 1 (or None for no limit)"
        )


def test_choices_suggest_the_nearest():
    assert checks.choice("field", "mean", ("mean", "sum")) == "mean"
    error = refusal(checks.choice, "means", allowed=("mean", "sum"))
    assert str(error).endswith("'means' is not allowed; choose one of 'mean', 'sum'; did you mean 'mean'?")
    for value in ("x", 3, None, ["mean"]):
        error = refusal(checks.choice, value, allowed={"mean": 1, "sum": 2}, hint="or None")
        assert str(error).endswith(f"{value!r} is not allowed; choose one of 'mean', 'sum' (or None)")


def test_switches():
    assert checks.switch("field", True) is True and checks.switch("field", False) is False
    for value in (0, 1, "true", None):
        assert str(refusal(checks.switch, value)).endswith(f"{value!r} is not allowed; must be true or false")


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("rskfac", "; did you mean 'rs-kfac'?"),
        ("RS-KFAC", "; did you mean 'rs-kfac'?"),
        ("adam", "; did you mean 'Adam'?"),
        ("lbfgs", ""),
        ("", ""),
    ],
)
def test_suggestions_whatever_the_case(word: str, hint: str):
    assert checks.suggestion(word, iter(["kfac", "rs-kfac", "Adam"])) == hint
