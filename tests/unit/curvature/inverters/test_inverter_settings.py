"""Making inverters by name: unknown names and values are refused with what is allowed."""

from typing import Any

import pytest

from kfdist.curvature.inverters import INVERTERS, make_inverter
from kfdist.curvature.jobs import fingerprint
from kfdist.errors import ConfigError
from kfdist.types import BlockShape


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("rskfac", {}, "unknown method 'rskfac'; did you mean 'rs-kfac'"),
        ("adam", {}, "allowed are kfac, kfac-eigen, "),
        ("rs-kfac", {"ranks": 5}, "rs-kfac has no setting 'ranks'; did you mean 'rank'"),
        ("kfac", {"rank": 5}, "kfac has no setting 'rank'"),
        ("rs-kfac", {"rank": 0}, "rank: 0 is not allowed; must be a whole number of at least 1"),
        ("rs-kfac", {"rank": 2.5}, "rank: 2.5"),
        ("rs-kfac", {"rank": True}, "rank: True"),
        ("rs-kfac", {"oversampling": -1}, "oversampling: -1"),
        ("rs-kfac", {"power_iterations": "4"}, "power_iterations: '4'"),
        ("rs-kfac", {"method": "svd"}, "rs-kfac has no setting 'method'"),
        ("sre-kfac", {"warm_start": 1}, "warm_start: 1 is not allowed; must be true or false"),
        ("sre-kfac", {"rank_schedule": 3}, "rank_schedule: 3 is not allowed; write a list of pairs"),
        ("rs-kfac", {"rank_schedule": [5]}, "rank_schedule: 5 is not allowed; write pairs"),
        ("rs-kfac", {"rank_schedule": [[5]]}, r"rank_schedule: \[5\] is not allowed; write pairs"),
        ("rs-kfac", {"rank_schedule": [[5, 0]]}, "rank_schedule: 0 is not allowed; must be a whole number of at least"),
        ("rs-kfac", {"rank_schedule": [[5, 9], [5, 8]]}, r"rank_schedule: the inversions \[5, 5\] .* must rise"),
        ("rs-kfac", {"adaptive_rank": True, "rank_schedule": [[5, 9]]}, "adaptive_rank: true excludes a rank_schedule"),
        (
            "rs-kfac",
            {"adaptive_rank": True, "rank": 9},
            "rank: 9 is not allowed with adaptive_rank; must be from 10 to",
        ),
        ("rs-kfac", {"damping_rule": "exact"}, "damping_rule: 'exact'"),
        ("rs-kfac", {"direction_error": 1}, "direction_error: 1 is not allowed"),
        ("sre-kfac", {"direction_error": "5 %"}, "direction_error: '5 %' is not allowed"),
        ("b-kfac", {"direction_error": -0.1}, "direction_error: -0.1 is not allowed"),
        ("b-kfac", {"direction_error": False}, "direction_error: False is not allowed"),
        ("rs-kfac", {"spectrum_continuation": 1}, "spectrum_continuation: 1"),
        ("kfac", {"damping_rule": "common"}, "damping_rule: 'common' is not allowed; choose one of 'pi', 'relative'"),
        ("kfac-eigen", {"damping_rule": "none"}, "choose one of 'common', 'pi', 'relative'"),
    ],
)
def test_bad_settings_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_inverter(name, **settings)


@pytest.mark.parametrize("name", ["rs-kfac", "sre-kfac"])
def test_defaults_are_the_published_ones_but_for_pairs_that_nothing_needs(name: str) -> None:
    made = make_inverter(name)
    assert made.settings() == {
        "rank": 220,
        "oversampling": 10,
        "power_iterations": 4,
        "spectrum_continuation": False,
        "damping_rule": "pi",
        "rank_schedule": (),
        "adaptive_rank": False,
        "warm_start": False,
        "direction_error": 0.05,
    }


def test_a_low_rank_inversion_is_cheaper_than_a_full_one() -> None:
    wide = BlockShape(d_out=2048, d_in=4097)
    costs = {name: make_inverter(name).cost(wide) for name in INVERTERS}
    assert costs["kfac"] < costs["kfac-eigen"]
    assert costs["sre-kfac"] < costs["rs-kfac"] < costs["kfac-eigen"]


def test_fingerprints_tell_apart_what_changes_bits() -> None:
    one, two = fingerprint("cpu", 1), fingerprint("cpu", 2)
    assert one != two and one == fingerprint("cpu", 1)
    assert one.startswith("cpu;") and ";threads=1;" in one and ";torch=" in one
    assert "\n" not in one
