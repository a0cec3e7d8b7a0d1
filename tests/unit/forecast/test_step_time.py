"""Where a step's time comes from: what is given, then what was measured, then operations and a speed."""

from typing import Any

import pytest

from kfdist.config import load_config
from kfdist.curvature.auto import MeasuredCosts
from kfdist.forecast.earlier_run import EarlierRun
from kfdist.forecast.inversion_costs import Costs
from kfdist.forecast.rehearsal import Rehearsal
from kfdist.forecast.step_time import GPUS, REACHED, StepTime, step_times
from kfdist.forecast.trial_steps import Trial
from kfdist.runtime.plan.coverage import Coverage

COSTS = Costs(operations=MeasuredCosts(rates={}), methods={}, threads=1, flops_per_second=1e9)
EARLIER = EarlierRun(name="runs/a", noise_scale=None, step_seconds=0.2)


def _times(flops: float | None = 4e9, *overrides: str, **given: Any) -> list[StepTime]:
    config = load_config(None, environment={}, overrides=overrides)
    rehearsal = Rehearsal(coverage=Coverage(()), flops=flops, fault="" if flops else "it branches")
    trial = given.pop("trial", Trial(None, why_not="too dear"))
    given = {"given": None, "earlier": None, "gpus": (), "here": (), **given}
    return step_times(config, rehearsal, COSTS, **given, trial=lambda _: trial)


def test_what_is_given_comes_before_what_was_measured_and_that_before_what_is_derived() -> None:
    assert _times(given=0.5, earlier=EARLIER) == [StepTime(0.5, "as given", gpu=False)]
    assert _times(earlier=EARLIER)[0].seconds == 0.2
    (derived,) = _times(earlier=EarlierRun(name="b", noise_scale=1.0, step_seconds=None))
    assert derived.seconds == 4.0 and "1 GFLOP/s of this CPU" in derived.source


def test_real_steps_come_before_operations_but_not_before_what_is_known_of_the_run() -> None:
    tried = Trial(0.03, steps=7)
    (found,) = _times(trial=tried)
    assert found.seconds == 0.03 and found.source.startswith("measured: 7 real steps")
    assert _times(trial=tried, earlier=EARLIER)[0].seconds == 0.2
    assert _times(trial=tried, gpus=["A100"])[0].gpu
    assert "(too dear)" in _times()[0].source


def test_a_rank_that_was_tried_alone_shares_the_processors_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    alone = StepTime(0.1, "measured", alone=True)
    assert alone.beside(1.5).seconds == 0.1
    assert alone.beside(3.0).seconds == pytest.approx(0.15) and "2 processors" in alone.beside(3.0).source
    assert StepTime(0.1, "as given").beside(3.0) == StepTime(0.1, "as given")


def test_gpus_by_their_data_sheets_and_the_precision() -> None:
    single, half = (_times(4e12, f'run.precision="{kind}"', gpus=["a100"])[0] for kind in ("float32", "bfloat16"))
    assert single.seconds == pytest.approx(4e12 / (REACHED * GPUS["A100"].single))
    assert half.seconds == pytest.approx(4e12 / (REACHED * GPUS["A100"].half))
    assert [each.seconds is None for each in _times(gpus=["H100", "H1000"])] == [False, True]
    assert "did you mean 'H100'" in _times(gpus=["H1000"])[0].source


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA A100-SXM4-80GB", "Tesla T4"])
def test_this_machines_gpus_are_known_by_their_names(name: str) -> None:
    (found,) = _times(4e12, here=[name])
    assert found.seconds is not None and found.source.startswith("derived for ")
    assert _times(4e12, here=["Quadro P400"])[0].seconds is None


def test_a_step_of_few_operations_is_said_to_take_longer() -> None:
    assert "aren't in it: give --step-seconds" in _times(4e6)[0].source
    assert "aren't in it" not in _times(4e9)[0].source
    assert "aren't in it" in _times(4e9, gpus=["H100"])[0].source


def test_without_operations_nothing_can_be_derived() -> None:
    (unknown,) = _times(None, gpus=["H100"])
    assert unknown.seconds is None and "it branches" in unknown.source and "--step-seconds" in unknown.source
