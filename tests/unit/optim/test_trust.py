"""lambda and gamma by the paper's rules, with their bounds."""

import math

import pytest

from kfdist.errors import ConfigError
from kfdist.optim.adaptive_settings import AdaptiveSettings, Trust

ETA = 0.25


def trust(damping: float = 2.0, **settings) -> Trust:
    return Trust(AdaptiveSettings(**settings), damping, ETA)


def test_the_defaults_are_the_papers():
    settings = AdaptiveSettings()
    assert (settings.damping_period, settings.gamma_period) == (5, 20)
    assert settings.damping_factor == pytest.approx((19 / 20) ** 5)
    assert settings.gamma_factor == pytest.approx((19 / 20) ** 10)


@pytest.mark.parametrize(
    ("rho", "direction"),
    [(0.76, -1), (0.75, 0), (0.5, 0), (0.25, 0), (0.24, 1), (-3.0, 1), (math.inf, -1), (-math.inf, 1), (math.nan, 1)],
)
def test_lambda_follows_the_ratio(rho: float, direction: int):
    each = trust(damping_factor=0.5)
    each.adapt(rho)
    assert each.damping == 2.0 * 2.0**direction


def test_lambda_stays_within_its_bounds():
    each = trust(damping_factor=0.5, smallest_damping=1.5, largest_damping=3.0)
    each.adapt(1.0)
    assert each.damping == 1.5
    each.adapt(0.0)
    each.adapt(0.0)
    assert each.damping == 3.0


def test_rejections_in_a_row_raise_lambda_ever_faster():
    each = trust(damping=1.0, damping_factor=0.5)
    seen = []
    for _ in range(3):
        each.reject()
        seen.append(each.damping)
    each.accept()
    each.reject()
    assert [*seen, each.damping] == [2.0, 8.0, 128.0, 256.0]


def test_lambda_is_adapted_every_period():
    assert [count for count in range(1, 13) if trust(damping_period=4).adapts(count)] == [4, 8, 12]


def test_gamma_is_searched_every_period_and_kept_in_between():
    each = trust(gamma_period=3, gamma_factor=0.5)
    gamma = math.sqrt(2.0 + ETA)
    assert each.candidates(1) == each.candidates(2) == [gamma]
    assert each.candidates(3) == [gamma, 0.5 * gamma, 2.0 * gamma]
    each.adapt(1.0)
    assert each.candidates(4) == [gamma]  # tuned on its own


def test_gamma_has_the_floor_of_lambda():
    each = trust(gamma_period=1, gamma_factor=0.01, smallest_damping=2.0)
    assert each.candidates(1) == pytest.approx([1.5, 150.0])


def test_without_a_search_gamma_follows_lambda():
    each = trust(gamma_search=False, damping_factor=0.5)
    each.adapt(1.0)
    assert each.candidates(20) == [math.sqrt(1.0 + ETA)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("damping_period", 0),
        ("gamma_period", 2.5),
        ("damping_period", True),
        ("damping_factor", 1.0),
        ("gamma_factor", 0.0),
        ("gamma_factor", "small"),
        ("smallest_damping", 0.0),
        ("smallest_damping", math.inf),
        ("largest_damping", 1e-9),
        ("largest_damping", math.nan),
        ("gamma_search", 1),
        ("momentum", "no"),
        ("rejection", None),
        ("differentiation", "backward"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field: str, value: object):
    with pytest.raises(ConfigError, match=rf"^{field}: {value!r} is not allowed"):
        AdaptiveSettings(**{field: value})  # pyright: ignore[reportArgumentType]
