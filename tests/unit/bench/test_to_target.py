"""`kfdist bench target`: which cells there are, which rate is the best, and that everyone can train."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kfdist.bench.contest import RIVALS, TASKS
from kfdist.bench.to_target import (
    TargetSettings,
    best,
    cell_name,
    describe,
    held,
    known_cells,
    measure_target,
    plot,
    train,
)
from kfdist.errors import ConfigError


def cell(rate: float, seconds: float | None, last: float | None = 1.0, seed: int = 0) -> dict[str, Any]:
    steps = None if seconds is None else int(10 * seconds)
    return {"rate": rate, "seed": seed, "seconds": seconds, "steps": steps, "last": last, "milliseconds_a_step": 100.0}


def test_the_best_rate_is_the_soonest_at_the_goal():
    found = best([cell(0.1, 3.0), cell(0.2, 2.0), cell(0.3, None)])
    assert found is not None
    assert (found["rate"], found["seconds"], found["steps"], found["at_edge"]) == (0.2, 2.0, 20, False)


def test_where_none_reaches_the_goal_the_closest_is_the_best_and_what_diverged_is_not():
    found = best([cell(0.1, None, 0.5), cell(0.2, None, 0.4), cell(0.3, None, None)])
    assert found is not None
    assert (found["rate"], found["seconds"], found["last"]) == (0.2, None, 0.4)


def test_a_rate_is_judged_by_the_median_of_its_seeds():
    lucky = [cell(0.1, 1.0), cell(0.1, None, seed=1), cell(0.1, None, seed=2)]
    steady = [cell(0.2, 3.0, seed=seed) for seed in range(3)]
    found = best([*lucky, *steady])
    assert found is not None and (found["rate"], found["seconds"], found["seeds"]) == (0.2, 3.0, 3)
    assert best([]) is None


def test_what_is_known_is_not_trained_again_unless_it_had_less_time():
    settings = TargetSettings(tasks=("digits-cnn",), rivals=("adamw",), seconds=1e-6)
    told: list[int] = []
    known: dict[str, Any] = {}
    found = measure_target(settings, known, lambda content: told.append(len(content["cells"])))
    assert told == [1, 2, 3, 4] and known == {}
    assert all(each["steps_done"] == TASKS["digits-cnn"].evaluation_period for each in found["cells"].values())
    measure_target(settings, found["cells"], lambda content: pytest.fail("everything is known"))
    short = {**found["cells"], cell_name("digits-cnn", "adamw", 0.01, 0): cell(0.01, 1.0) | {"limit": 1e-9}}
    told.clear()
    measure_target(settings, short, lambda content: told.append(len(content["cells"])))
    assert told == [4]
    shown = describe(found)
    assert "digits CNN" in shown and "AdamW" in shown and "autoencoder" not in shown
    assert "adamw" in plot(found)


@pytest.mark.parametrize("rival", RIVALS)
def test_everyone_trains(rival: str):
    task = replace(TASKS["digits-autoencoder"], seconds=1e-6, evaluation_period=1)
    chosen = RIVALS[rival]
    found = train(task, chosen, chosen.rates[0], 0)
    assert found["steps_done"] == 1 and found["seconds"] is None and found["last"] != found["curve"][0][2]


def test_a_reached_goal_ends_the_training():
    task = replace(TASKS["digits-autoencoder"], goal=1e9)
    found = train(task, RIVALS["sgd"], 0.1, 0)
    assert found["steps_done"] == 2 * task.evaluation_period and found["seconds"] == 0.0 and found["steps"] == 0


def test_one_lucky_measurement_is_not_the_goal():
    below, above = (0.0, 0, 0.9), (0.0, 0, 1.1)
    assert held([above, below, below, below], 1.0)
    assert not held([below, below], 1.0) and not held([below, below, above], 1.0)
    assert not held([below, above, below, below], 1.0)


def test_another_files_content_is_refused(tmp_path: Path):
    file = tmp_path / "target.json"
    assert known_cells(file) == {}
    file.write_text(json.dumps({"steps": 3}))
    with pytest.raises(ConfigError, match="--out: .*target.json.*name another file"):
        known_cells(file)


@pytest.mark.parametrize("given", [{"tasks": ("x",)}, {"rivals": ("x",)}, {"seeds": 0}, {"seconds": 0.0}])
def test_wrong_settings_are_refused(given: dict[str, Any]):
    with pytest.raises(ConfigError, match=f"--{next(iter(given)).rstrip('s') if 's' in next(iter(given)) else ''}"):
        TargetSettings(**given)
