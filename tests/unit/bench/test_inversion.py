"""`kfdist bench inversion`: errors and bounds; how long anything takes is not for a test."""

from typing import Any

import pytest

from kfdist.bench import factor_problem, inversion
from kfdist.bench.brand_floor import over_floor
from kfdist.bench.factor_problem import Problem
from kfdist.bench.inversion import (
    InversionSettings,
    brand_over_bound,
    describe,
    faster,
    measure_inversion,
    plot,
)
from kfdist.bench.measuring import measured
from kfdist.errors import ConfigError


@pytest.fixture
def few_examples(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inversion, "EXAMPLES", 20)
    monkeypatch.setattr(factor_problem, "EXAMPLES", 20)
    monkeypatch.setattr(inversion, "_MOST_REPETITIONS", 1)


def test_all_methods_are_measured_and_the_exact_ones_are_exact(few_examples: None):
    settings = InversionSettings(sizes=(60, 90), ranks=(10, 20), rank=20, size_for_ranks=90)
    found = measured(lambda: measure_inversion(settings))
    errors = {name: points[-1]["error"] for name, points in found["by_size"].items()}
    assert {name for name, error in errors.items() if error < 1e-2} == {"kfac", "kfac-eigen", "cg-fac", "seng", "eva"}
    assert all(errors[name] < 0.7 for name in ("rs-kfac", "sre-kfac", "b-kfac"))
    by_rank = found["by_rank"]
    assert set(by_rank) == {"rs-kfac", "sre-kfac", "b-kfac"}
    assert by_rank["rs-kfac"][1]["error"] < by_rank["rs-kfac"][0]["error"]
    assert {len(found[f"brand_update_over_its_{name}"]) for name in ("products", "floor")} == {2}
    shown = describe(found)
    assert "error by rank, d = 90" in shown and "times faster" in shown
    assert "sre-kfac" in plot(found)


def points(*seconds: float) -> list[dict[str, Any]]:
    return [{"d": 2**number, "seconds": each} for number, each in enumerate(seconds)]


def test_what_would_take_too_long_is_not_tried(monkeypatch: pytest.MonkeyPatch, few_examples: None):
    tried: list[tuple[str, int]] = []

    def measure(name: str, problem: Problem, rank: int) -> dict[str, Any]:
        tried.append((name, problem.d))
        return {"seconds": 1.0, "error": 0.0}

    monkeypatch.setattr(inversion, "_measure", measure)
    settings = InversionSettings(methods=("kfac", "eva"), sizes=(40, 80, 160), rank=16, size_for_ranks=40)
    measure_inversion(settings.__class__(**{**vars(settings), "limit_seconds": 4.0}))
    assert [d for name, d in tried if name == "kfac"] == [40]  # 80 would take 8 s
    assert [d for name, d in tried if name == "eva"] == [40, 80, 160]


def test_ratios_are_of_equal_sizes():
    found = faster({"kfac-eigen": points(1.0, 8.0), "rs-kfac": points(0.5, 1.0, 2.0)})
    assert found == {"1": {"rs-kfac": 2.0}, "2": {"rs-kfac": 8.0}}
    products, small = 4 * 220 * 256 + 4 * 256**2 + 2 * 476**2, 9 * 476**3
    points_of_brand = [{"d": 2, "seconds": 3.0}]
    assert brand_over_bound(points_of_brand, 220, 2.0 * products) == {"2": 3.0}
    assert brand_over_bound(points_of_brand, 220, 2.0 * products + small, eigendecomposition=True) == {"2": 3.0}


def test_a_floor_is_of_the_parts_named():
    points_of_brand = [{"d": 2, "seconds": 6.0, "floor": {"products": 3.0, "eigendecomposition": 1.0}}]
    assert over_floor(points_of_brand, "products") == {"2": 2.0}
    assert over_floor(points_of_brand, "products", "eigendecomposition") == {"2": 1.5}


@pytest.mark.parametrize(
    ("given", "message"), [({"methods": ("ekfac",)}, "--method"), ({"sizes": (400,)}, "--size: .*400.*476")]
)
def test_wrong_settings_are_refused(given: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        InversionSettings(**given)
