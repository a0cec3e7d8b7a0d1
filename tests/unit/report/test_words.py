"""Numbers, durations, sizes and times as the report says them."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfdist.report import words


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "–"),
        (True, "True"),
        ("rs-kfac", "rs-kfac"),
        (0, "0"),
        (12_345, "12,345"),
        (3.0, "3"),
        (-3.0, "-3"),
        (0.123456, "0.1235"),
        (999.96, "1000"),
        (1234.56, "1,235"),
        (9999.6, "10,000"),
        (12_345.678, "12,346"),
        (-12_345.678, "-12,346"),
        (1_234_567.0, "1,234,567"),
        (1.5e9, "1.5e+09"),
        (0.0000123456, "1.235e-05"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_numbers(value: Any, said: str):
    assert words.number(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "–"),
        (math.nan, "–"),
        (0.0, "0 µs"),
        (0.0000123, "12.3 µs"),
        (0.0009994, "999 µs"),
        (0.0009996, "1 ms"),
        (0.25, "250 ms"),
        (0.9996, "1 s"),
        (59.94, "59.9 s"),
        (119.4, "119 s"),
        (119.6, "2.0 min"),
        (6543.0, "109.0 min"),
        (7200.0, "2.0 h"),
        (172_800.0, "2.0 days"),
        (1_234_567.0, "14.3 days"),
    ],
)
def test_durations(value: float | None, said: str):
    assert words.seconds(value) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (1_234_567, "1.23 MB"),
        (45_600_000_000, "45.6 GB"),
        (3e18, "3000 PB"),
    ],
)
def test_sizes(value: float, said: str):
    assert words.size(value) == said


@given(st.floats(1e-6, 1e7))
def test_a_duration_is_what_is_said_of_it_within_a_twentieth(value: float):
    said, unit = words.seconds(value).split()
    factors = {"µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "days": 86_400.0}
    assert "e" not in said
    assert float(said) * factors[unit] == pytest.approx(value, rel=0.05)


@given(st.integers(1, 10**17))
def test_a_size_is_what_is_said_of_it_within_a_hundredth(value: int):
    said, unit = words.size(value).split()
    assert float(said) * 1000 ** ("B", "kB", "MB", "GB", "TB", "PB").index(unit) == pytest.approx(value, rel=0.006)
    assert "e" not in said and (float(said) < 1000 or value > 1e15)


@pytest.mark.parametrize(
    ("value", "unit"),
    [
        (0.5, (1, "seconds")),
        (179, (1, "seconds")),
        (180, (60, "minutes")),
        (3 * 3600, (3600, "hours")),
        (3 * 86_400, (86_400, "days")),
    ],
)
def test_units_of_axes(value: float, unit: tuple[int, str]):
    assert words.time_unit(value) == unit


def test_sentences():
    assert [words.listed(each) for each in ([], ["A"], ["A", "B"], ["A", "B", "C"])] == [
        "",
        "A",
        "A and B",
        "A, B and C",
    ]
    assert [words.counted(each, "step") for each in (0, 1, 1000)] == ["0 steps", "1 step", "1,000 steps"]
    assert [words.metric(name, 0.98765) for name in ("test_accuracy", "test_loss")] == ["98.77 %", "0.9877"]
    assert words.share(None) == "–"
    assert words.moment(86_400.0) == "1970-01-02 00:00:00 UTC"
