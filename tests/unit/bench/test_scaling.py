"""`kfdist bench scale`: the model's arithmetic, and that assumptions are told with it."""

from pathlib import Path

import pytest

from kfdist.bench.measuring import measured
from kfdist.bench.scaling import ScaleSettings, checked_numbers, describe, measure_scale, network_seconds, plot
from kfdist.errors import ConfigError
from kfdist.forecast import forecast, inversion_costs
from kfdist.policies.staleness import oldest, usual_delay

FAST = ScaleSettings(gigabytes_a_second=2.0, hop_microseconds=10.0)


@pytest.mark.parametrize(
    ("size", "collectives", "ranks", "seconds"),
    [(4e9, 0.0, 8, 2.0), (0.0, 3.0, 8, 3 * 6e-5), (0.0, 1.0, 1, 0.0), (2e9, 1.0, 4096, 1.0 + 24e-5)],
)
def test_bytes_take_their_time_and_each_collective_its_hops(
    size: float, collectives: float, ranks: int, seconds: float
):
    assert network_seconds(FAST, size, collectives, ranks) == pytest.approx(seconds)


RUN = """
[run]
steps = 1000

[model]
name = "mlp"
settings = { hidden = [64] }

[data]
name = "synthetic"

[preconditioner]
method = "rs-kfac"
factor_period = 10
inverse_period = 100
"""

GRADIENT_BYTES = 4 * (64 * 64 + 64 + 64 * 10 + 10)
BLOCKS = 2


def test_a_run_is_calculated_and_shown_with_its_assumptions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "run.toml").write_text(RUN)
    measurements: list[object] = []
    measure = inversion_costs.measure
    monkeypatch.setattr(inversion_costs, "_BUDGET", 0.0)
    monkeypatch.setattr(
        forecast, "measure", lambda *given, **named: measurements.append(measure(*given, **named)) or measurements[-1]
    )
    settings = ScaleSettings(config=str(tmp_path / "run.toml"), ranks=(2, 1024), owners=(1, 4), step_seconds=1e-3)
    found = measured(lambda: measure_scale(settings))
    assert len(measurements) == 1, "what inversions take here is measured once"
    for each in found["by_ranks"]:
        ranks, sent = each["ranks"], sum(each["kfdist_bytes_of_a_rank"].values())
        assert each["gradient_bytes_of_a_rank"] == pytest.approx(GRADIENT_BYTES * 2 * (ranks - 1) / ranks)
        assert 0 < each["share_of_gradient"] == pytest.approx(sent / each["gradient_bytes_of_a_rank"], abs=1e-5)
        # At each step the table, once in a period the statistics and the snapshot of each block.
        assert each["seconds_a_step"] == pytest.approx(network_seconds(settings, sent, 1 + 2 * BLOCKS / 100, ranks))
    alone, four = found["by_owners"]
    assert alone["busy"] > four["busy"] > 0
    least = oldest(100, usual_delay(ranks=1024, gpu=False))
    assert least <= four["largest_staleness"] <= alone["largest_staleness"] < least + 20
    shown = describe(found)
    assert all(sentence in shown for sentence in settings.assumptions())
    assert "owners" in plot(found)


def test_numbers_are_taken_once_and_rising():
    assert checked_numbers([8, 2, 8], (1,)) == (2, 8)
    assert checked_numbers(None, (1, 4)) == (1, 4)


@pytest.mark.parametrize("given", [{"step_seconds": 0.0}, {"ranks": (0, 4)}, {"owners": ()}])
def test_wrong_settings_are_refused(given: dict):
    with pytest.raises(ConfigError, match=f"--{next(iter(given)).replace('_', '-')}"):
        ScaleSettings(**given)
