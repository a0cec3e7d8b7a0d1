"""The method "auto": what it picks for which block, and that it says why. Costs are given: choices are exact."""

import json
import time
from typing import Any

import pytest

from kfdist.curvature.auto import ORDER, Auto, MeasuredCosts, Rate, make_choice, measure_costs
from kfdist.curvature.inverter import Operation
from kfdist.curvature.inverters import INVERTERS, make_inverter
from kfdist.curvature.inverters.rs_kfac import RANKS
from kfdist.errors import ConfigError
from kfdist.types import BlockShape

GIGAFLOP = 1e-9

COSTS = MeasuredCosts(
    rates={
        Operation.CHOLESKY: Rate(1e-4, GIGAFLOP / 20),
        Operation.EIGH: Rate(3e-4, GIGAFLOP / 40),
        Operation.SKETCH: Rate(1e-3, GIGAFLOP / 40),
        Operation.BRAND: Rate(1e-3, GIGAFLOP / 40),
    }
)
"""A CPU core of some 30 GFLOP/s."""


def linear(d_out: int, d_in: int) -> BlockShape:
    return BlockShape(d_out=d_out, d_in=d_in)


def convolution(d_out: int, d_in: int, groups: int = 1) -> BlockShape:
    return BlockShape(d_out=d_out, d_in=d_in, groups=groups, convolution=True)


@pytest.mark.parametrize(
    ("shape", "name", "words"),
    [
        (linear(1, 2), "kfac-eigen", "kfac-eigen: 0.0006 s and 48 B of a budget of 2 s and 1 GiB"),
        (linear(10, 65), "kfac-eigen", "kfac-eigen: 0.00066 s"),
        (convolution(1, 10, groups=512), "kfac-eigen", "kfac-eigen: 0.31 s and 424 KiB"),
        (convolution(512, 4609), "rs-kfac", "kfac-eigen would take 22 s"),
        (linear(2048, 2049), "rs-kfac", "kfac-eigen would take 3.9 s"),
        (linear(512, 32769), "b-kfac", "rs-kfac with rank 32 would take 9.1 s and 4.01 GiB"),
        (convolution(512, 32769), "eva", "b-kfac with rank 32 would take 9.1 s and 4.02 GiB"),
    ],
    ids=str,
)
def test_the_most_faithful_method_within_the_budget_is_taken(shape: BlockShape, name: str, words: str) -> None:
    inverter, reason = Auto().choose(shape, COSTS)
    assert type(inverter) is INVERTERS[name]
    assert reason.startswith(name)
    assert words in reason
    assert (inverter, reason) == Auto().choose(shape, COSTS)


def test_more_time_allows_a_higher_rank_and_in_the_end_everything() -> None:
    found = [Auto(seconds_per_inversion=s).choose(linear(2048, 4097), COSTS)[0] for s in (0.4, 0.8, 1.5, 3.0, 20.0)]
    assert [inverter.name for inverter in found] == ["rs-kfac"] * 4 + ["kfac-eigen"]
    ranks = [inverter.settings()["rank"] for inverter in found[:-1]]
    assert ranks == sorted(ranks) and len(set(ranks)) > 2 and set(ranks) <= set(RANKS)


def test_a_slower_machine_gets_cheaper_methods() -> None:
    slower = MeasuredCosts(rates={**COSTS.rates, Operation.EIGH: Rate(3e-4, 100 * GIGAFLOP)})
    shape = linear(256, 257)
    assert Auto().choose(shape, COSTS)[0].name == "kfac-eigen"
    inverter, reason = Auto().choose(shape, slower)
    assert (inverter.name, inverter.settings()["rank"]) == ("rs-kfac", 64)
    assert "kfac-eigen would take 30 s" in reason


def test_memory_alone_can_decide() -> None:
    shape = linear(256, 2049)
    inverter, reason = Auto(bytes_per_block=20 * 2**20, seconds_per_inversion=100).choose(shape, COSTS)
    assert inverter.name == "rs-kfac"
    assert "kfac-eigen would take 34.5 MiB" in reason and "of a budget of 1e+02 s and 20 MiB" not in reason
    assert "of a budget of 100 s and 20 MiB" in reason


def test_only_what_is_allowed_is_chosen() -> None:
    auto = Auto(allow=("sre-kfac", "kfac"))
    assert auto.choose(linear(64, 65), COSTS)[0].name == "kfac"
    assert auto.choose(linear(512, 8193), COSTS)[0].name == "sre-kfac"


def test_where_nothing_fits_the_smallest_excess_is_taken_and_told() -> None:
    inverter, reason = Auto(allow=("kfac-eigen", "rs-kfac"), seconds_per_inversion=1e-3).choose(
        linear(512, 4609), COSTS
    )
    assert (inverter.name, inverter.settings()["rank"]) == ("rs-kfac", 32)
    assert "kfac-eigen would take 22 s" in reason
    assert reason.endswith("nothing fits, this exceeds the budget least")


def test_costs_survive_json_to_the_last_bit() -> None:
    assert MeasuredCosts.from_json(json.loads(json.dumps(COSTS.to_json()))) == COSTS


def test_this_machine_is_measured_in_little_time() -> None:
    start = time.process_time()  # tests share their cores
    costs = measure_costs()
    assert time.process_time() - start < 3  # 0.3 s
    assert all(rate.fixed >= 0 and rate.per_flop > 0 for rate in costs.rates.values())
    assert costs.rates.keys() == set(Operation) - {Operation.PRODUCTS}
    assert MeasuredCosts.from_json(costs.to_json()) == costs
    assert Auto().choose(linear(32, 33), costs)[0].name == "kfac-eigen"


def test_names_make_inverters_or_the_chooser() -> None:
    assert make_choice("auto", seconds_per_inversion=3, allow=["kfac"]) == Auto(
        seconds_per_inversion=3, allow=("kfac",)
    )
    assert make_choice("rs-kfac", rank=3) == make_inverter("rs-kfac", rank=3)
    assert set(ORDER) <= set(INVERTERS)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("auto", {"budget": 3}, "settings: auto has no setting 'budget'; allowed are seconds_per_inversion, bytes_"),
        (
            "auto",
            {"seconds_per_inversion": 0},
            "seconds_per_inversion: 0 is not allowed; must be a finite number",
        ),
        ("auto", {"seconds_per_inversion": "2"}, "seconds_per_inversion: '2'"),
        ("auto", {"bytes_per_block": float("inf")}, "bytes_per_block: inf"),
        ("auto", {"allow": []}, r"allow: \(\) is not allowed; name some of kfac-eigen"),
        ("auto", {"allow": "kfac"}, "allow: 'kfac' is not allowed"),
        ("auto", {"allow": ["seng"]}, r"allow: \('seng',\) is not allowed"),
        ("autp", {}, "method: unknown method 'autp'; did you mean 'auto'"),
        ("rs-kfac", {"ranks": 3}, "did you mean 'rank'"),
    ],
)
def test_bad_settings_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_choice(name, **settings)


def test_auto_is_no_inverter() -> None:
    with pytest.raises(ConfigError, match="method: auto isn't an inverter, it chooses one per block"):
        make_inverter("auto")
