"""The screen of `kfdist watch`, drawn from what a controller tells."""

import io
import math
from datetime import UTC, datetime

import pytest
from rich.console import Console

from kfdist.cli.live_view import RunPicture, sparkline
from kfdist.control.client import OwnerView, RunView
from kfdist.control.control_records import RunState
from kfdist.types import MetricSample

BLOCKS = tuple(
    MetricSample(name="kfdist_staleness_steps", value=number, labels={"block": f"encoder.layers.{number}.dense"})
    for number in range(300)
)


def run(**changes) -> RunView:
    told = {
        "name": "digits",
        "state": RunState.RUNNING,
        "revision": 7,
        "epoch": 2,
        "step": 340,
        "total_steps": 1200,
        "live_workers": 2,
        "live_owners": 2,
        "created": datetime(2026, 11, 1, tzinfo=UTC),
        "directory": "/data/experiments/2026-11/second-order/digits/run-17",
        "gauges": {"kfdist_loss": 0.125, "kfdist_accuracy": 0.975, "kfdist_staleness_steps": 12.0},
        "settings": {},
        "settings_revision": 0,
        "obeyed_revision": 0,
        "obeyed_step": 0,
        "world_size": 2,
        "changed": (),
    }
    return RunView(**{**told, **changes})


def owners(**groups: int) -> list[OwnerView]:
    return [OwnerView(name=name, groups=count, draining=not count) for name, count in groups.items()]


def lines(picture: RunPicture, width: int = 80, height: int = 24) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None, force_terminal=True)
    console.print(picture)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("periods", "words"),
    [((20, 20), "inverses every 20 steps"), ((20, 100), "inverses every 20 to 100 steps"), ((), "every 100 steps")],
)
def test_the_periods_are_the_blocks_own(periods, words):
    """The run's, 100, is that of methods without one, and all that ranks of earlier versions tell."""
    told = [
        MetricSample(name="kfdist_update_period_steps", value=value, labels={"block": str(place)})
        for place, value in enumerate(periods)
    ]
    shown = run(gauges={"kfdist_inverse_period_steps": 100.0})
    assert words in "\n".join(lines(RunPicture(run=shown, samples=told)))


def test_the_stalest_block_is_the_one_that_is_oldest_by_its_own_period():
    told = {"dense": (95.0, 20.0, 8.0), "wide": (101.0, 100.0, 9.0)}
    names = ("kfdist_staleness_steps", "kfdist_update_period_steps", "kfdist_staleness_seconds")
    samples = [
        MetricSample(name=name, value=value, labels={"block": block})
        for block, values in told.items()
        for name, value in zip(names, values, strict=True)
    ]
    text = "\n".join(lines(RunPicture(run=run(), samples=samples), width=120))
    assert "stalest block 95 steps, inverted every 20   its age 8.0 s" in text
    alike = [each for each in samples if each.labels["block"] == "wide"]
    text = "\n".join(lines(RunPicture(run=run(), samples=alike), width=120))
    assert "stalest block 101 steps   its age 9.0 s" in text
    assert "stalest block 12 steps" in "\n".join(lines(RunPicture(run=run()))), "of a run that ended: as it was told"


@pytest.mark.parametrize("width", [40, 80, 160])
def test_everything_fits(width):
    picture = RunPicture(run=run(), samples=BLOCKS, owners=owners(a=200, b=100), losses=[2.0, 1.0, 0.125], rate=12.5)
    shown = lines(picture, width)
    assert max(map(len, shown)) <= width
    assert len(shown) <= 24
    text = "\n".join(shown)
    assert "digits  running  step 340/1200" in shown[0]
    assert "0:01:09 left" in shown[1] and "28%" in shown[1]
    for told in ("ranks 2", "owners 2 (groups 200 + 100)", "steps/s 12.5", "loss 0.125", "accuracy 97.50%"):
        assert told in text
    first, *_ = [line for line in shown if "299" in line and "dense" in line]
    assert "█" in first or width == 40
    count = sum("dense" in line for line in shown)
    assert f"and {300 - count} more, none staler than {299 - count} steps" in text


def test_a_run_without_an_end_in_sight_is_shown():
    shown = lines(RunPicture(run=run(total_steps=10**12), rate=1e-3), 160)
    assert "11574 days, 1:46:40 left" in shown[1]


def test_what_is_missing_is_said():
    picture = RunPicture(
        run=run(live_workers=254, world_size=256, gauges={}), owners=owners(**dict.fromkeys("abcdef", 3)), note="away"
    )
    text = "\n".join(lines(picture))
    assert "ranks 254 of 256" in text
    assert "owners 2 (groups 3 to 3)" in text
    assert "loss" not in text and "BLOCK" not in text
    assert text.endswith("away")


def test_drained_owners_are_counted():
    assert "owners 2 (groups 4 + 0, 1 drained)" in "\n".join(lines(RunPicture(run=run(), owners=owners(a=4, b=0))))


def test_trouble_is_counted():
    samples = [
        MetricSample(name="kfdist_failures_total", value=2, labels={"reason": "deadline"}),
        MetricSample(name="kfdist_failures_total", value=1, labels={"reason": "crash"}),
        MetricSample(name="kfdist_restarts_total", value=0, labels={"process": "owner"}),
    ]
    text = "\n".join(lines(RunPicture(run=run(), samples=samples)))
    assert "failures 3" in text and "restarts" not in text


@pytest.mark.parametrize("state", list(RunState))
def test_any_state_of_any_run_can_be_drawn(state):
    shown = lines(
        RunPicture(run=run(state=state, total_steps=0, gauges={"kfdist_loss": math.nan}), losses=[math.nan] * 3)
    )
    assert shown[0] == f"digits  {state}  step 340"
    assert any(line.startswith("loss nan  !!!") for line in shown) or any("loss nan" in line for line in shown)


def test_a_long_name_loses_its_middle_and_not_the_step():
    shown = lines(RunPicture(run=run(name="x" * 63)), width=40)
    assert shown[0].endswith("running  step 340/1200") and len(shown[0]) <= 40


def test_sparklines():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, 1.0], 8) == "▁▁"
    assert sparkline([], 8) == ""
    assert len(sparkline(list(range(1000)), 20)) == 20
    assert sparkline([1, math.nan, 2], 8) == "▁!█"
    assert sparkline([1000.0, 100.0, 10.0, 1.0], 4) == "█▆▃▁", "by its logarithm"
    assert sparkline([0, 5], 4, plain=True) == "_#"
