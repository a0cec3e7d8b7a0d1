"""`kfdist bench overhead`: what is made of the steps' times, and that it runs; how long is not for a test."""

import json
from pathlib import Path

import pytest
import torch

from kfdist.bench.overhead import OverheadSettings, bounds, mean_diagnostics, summary
from kfdist.bench.timings import percentile, percentiles, spread
from kfdist.bench.trainee import PARTS, TimedStep, counting
from kfdist.bench.workloads import WORKLOADS, smooth_images
from kfdist.cli.main import run
from kfdist.errors import ConfigError


def timed(milliseconds: float, kind: str = "", **phases: float) -> TimedStep:
    return TimedStep({**dict.fromkeys(PARTS, 0.0), "backward": milliseconds / 1e3}, milliseconds / 2e3, phases, kind)


def test_the_spread_of_a_hundred_steps():
    seconds = [number / 1e3 for number in range(1, 101)]
    assert spread(seconds) == {"mean": 50.5, "p50": 50.5, "p99": 99.0, "max": 100.0}
    assert percentile(seconds, 1) == 0.001 and percentile(seconds, 1.1) == 0.002
    assert percentiles(seconds) == [1.0, *map(float, range(1, 101))]


def test_the_first_steps_dont_count_and_ratios_are_of_the_others():
    found = summary(
        {
            "sgd": [timed(9.0), timed(2.0), timed(2.0)],
            "kfdist": [
                timed(99.0),
                timed(3.0, "folds", fold=0.001),
                timed(13.0, "adopts", fold=0.003, precondition=0.01),
            ],
        },
        warm=1,
    )
    assert found["mean_ratio_to_sgd"] == 4.0 and found["cpu_ratio_to_sgd"] == 4.0 and found["p50_ratio_to_sgd"] == 4.0
    assert (found["mean"], found["p50"], found["p99"], found["max"]) == (8.0, 8.0, 13.0, 13.0)
    assert found["p99_over_p50"] == {"sgd": 1.0, "kfdist": 1.625}
    assert found["share_of_steps_over_1.5_medians"] == {"sgd": 0.0, "kfdist": 0.5}
    assert found["cpu_p99_over_p50"] == {"sgd": 1.0, "kfdist": 1.625}
    assert found["first_step_seconds"] == {"sgd": 0.009, "kfdist": 0.099}
    assert found["preconditioner_phases"] == {"precondition": 5.0, "fold": 2.0}
    assert found["sgd"]["parts"]["backward"]["mean"] == 2.0
    assert {kind: (each["steps"], each["max"]) for kind, each in found["by_kind"].items()} == {
        "adopts": (1, 6.5),
        "folds": (1, 1.5),
    }


def test_products_that_are_added_in_place_are_counted():
    left, right = torch.zeros(2, 3, 7), torch.zeros(2, 7, 5)
    for product in (lambda: torch.zeros(2, 3, 5).baddbmm_(left, right), lambda: left @ right):
        with counting() as counted:
            product()
        assert counted.get_total_flops() == 2 * 2 * 3 * 7 * 5


def test_what_operations_say_of_a_step():
    found = bounds(
        {
            "sgd": {"parts": {"forward": {"mean": 4.0}, "backward": {"mean": 6.0}}},
            "flops": {"sgd": {"forward_and_backward": 10**9}, "kfdist": {"preconditioner": 5 * 10**8}},
            "preconditioner_phases": {"precondition": 10.0},
            "gemm_flops_per_second": 2e11,
        }
    )
    assert found["gflops_per_second"] == {"passes": 100.0, "application": 50.0, "gemm": 200.0}
    assert found["least_ratio_of_passes"] == 1.5 and found["application_ms_at_gemm_rate"] == 2.5


def test_diagnostics_are_averaged_over_the_blocks_that_have_them():
    found = mean_diagnostics({"a": {"rank_A": 10.0, "residual_A": 1e-3}, "b": {"rank_A": 15.0, "rank_G": 4.0}, "c": {}})
    assert found == {"rank_A": 12.5, "rank_G": 4.0}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "resnet81"}, "--model: .*'resnet81'.*resnet18"),
        ({"inversions": "gpu"}, "--inversions: "),
        ({"steps": 0}, "--steps: "),
    ],
)
def test_wrong_settings_are_refused(given: dict[str, str | int], message: str):
    with pytest.raises(ConfigError, match=message):
        OverheadSettings(**given)  # type: ignore[arg-type]


def test_images_have_more_power_at_low_frequencies():
    images, labels = smooth_images((1, 16, 16), 200, torch.Generator().manual_seed(0))
    assert images.std() == pytest.approx(1.0, abs=1e-3) and set(labels.tolist()) == set(range(10))
    power = torch.fft.rfft2(images).abs().square().mean((0, 1))
    assert power[1, 1] > 20 * power[8, 8]


@pytest.mark.parametrize("name", ["gpt", "mlp"])
def test_equal_seeds_give_equal_losses(name: str):
    work = WORKLOADS[name]
    losses = [work.loss(work.model(0), work.batches(torch.Generator().manual_seed(1))()) for _ in range(2)]
    assert losses[0] == losses[1] and losses[0].ndim == 0


def test_it_measures_writes_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "made" / "overhead.json"
    words = "bench overhead --model mlp --method eva --steps 4 --inversions thread --json --out"
    monkeypatch.setattr("sys.argv", ["kfdist", *words.split(), str(out)])
    assert run() == 0
    shown, written = json.loads(capsys.readouterr().out), json.loads(out.read_text())
    assert shown == written
    assert 0 < shown["p50"] <= shown["p99"] <= shown["max"] and shown["mean_ratio_to_sgd"] > 0
    assert shown["flops"]["sgd"]["forward_and_backward"] > 1e9 and shown["versions"]["torch"] == torch.__version__
    assert shown["bounds"]["gflops_per_second"]["passes"] > 0
    assert sum(each["steps"] for each in shown["by_kind"].values()) == 4
    svg = out.with_suffix(".svg").read_text()
    assert svg.startswith('<svg width="640"') and "--series-0: #" in svg and "kfdist" in svg
