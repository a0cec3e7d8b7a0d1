"""`kfdist bench target`: which trainings there are, which rate is the best, and that everyone can train."""

import gzip
import json
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from kfdist.bench import to_target
from kfdist.bench.contest_rivals import RIVALS
from kfdist.bench.contest_tasks import TASKS, Task, small_resnet
from kfdist.bench.target_cells import best, describe, known_cells, plot
from kfdist.bench.to_target import Contest, TargetSettings, held, hopeless, measure_target, next_rate, train
from kfdist.errors import ConfigError


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that wait for each other take minutes beside other tests."""
    monkeypatch.setattr(to_target, "_computing_on", lambda threads: nullcontext())


def cell(
    rate: float, seconds: float | None, last: float | None = 1.0, seed: int = 0, *, apart: bool = False
) -> dict[str, Any]:
    steps = None if seconds is None else int(10 * seconds)
    result = {"seconds": seconds, "steps": steps, "last": last, "milliseconds_a_step": 100.0, "curve": []}
    return {"rate": rate, "seed": seed, "apart": apart, **result}


def test_the_best_rate_is_the_soonest_at_the_goal():
    found = best([cell(0.1, 3.0), cell(0.2, 2.0), cell(0.3, None)])
    assert found is not None
    assert (found["rate"], found["seconds"], found["steps"], found["at_edge"]) == (0.2, 2.0, 20, False)


def test_where_none_reaches_the_goal_the_closest_is_the_best_and_what_diverged_is_not():
    found = best([cell(0.1, None, 0.5), cell(0.2, None, 0.4), cell(0.3, None, None)])
    assert found is not None
    assert (found["rate"], found["seconds"], found["last"]) == (0.2, None, 0.4)


def test_what_is_reported_are_seeds_that_the_rate_was_not_tuned_with():
    tuning = [cell(0.1, 1.0), cell(0.2, 3.0)]
    found = best(tuning)
    assert found is not None and (found["seconds"], found["seeds"], found["tuned"]) == (1.0, 1, True)
    others = [cell(0.1, seconds, seed=seed + 1) for seed, seconds in enumerate((5.0, None, 4.0))]
    alone = [cell(0.1, 7.0, seed=1, apart=True), cell(0.2, 0.1, seed=1)]
    found = best([*tuning, *others, *alone])
    assert found is not None and (found["rate"], found["seconds"], found["seeds"]) == (0.1, 5.0, 3)
    assert found["apart_seconds"] == 7.0 and not found["tuned"]
    assert best([]) is None


RATES = [1e-3, 3e-3, 1e-2, 3e-2]


@pytest.mark.parametrize(
    ("tried", "chosen", "wanted"),
    [
        (RATES, 3e-2, 0.1),
        (RATES, 1e-3, 3e-4),
        ([*RATES, 0.1, 0.3, 1.0], 1.0, 0.55),  # no further than three beyond
        (RATES, 3e-3, 1.7e-3),
        ([1e-3, 1.7e-3, *RATES[1:]], 3e-3, 5.5e-3),
        ([1e-3, 1.7e-3, *RATES[1:]], 1.7e-3, None),
        ([1e-3, 1.7e-3, 3e-3, 5.5e-3, 1e-2, 3e-2], 3e-3, None),
        ([3e-4, *RATES], 3e-4, 1e-4),
    ],
)
def test_rates_go_on_beyond_an_edge_by_two_a_decade_and_then_halfway(
    tried: list[float], chosen: float, wanted: float | None
):
    assert next_rate(tried, chosen, least=1e-3, most=3e-2) == wanted


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, int, bool, float | None]]:
    """Trainings that were asked for; each costs as many seconds as its rate is far from 1, and 9 is its last value."""
    asked = []

    def trained(task: Task, rival: Any, rate: float, seed: int, *, apart: bool = False, **_: Any) -> dict[str, Any]:
        name = next(each for each in RIVALS if RIVALS[each] is rival)
        asked.append((name, rate, seed, apart, task.goal))
        done = cell(rate, abs(rate - 1.0) if task.goal else None, abs(rate - 1.0), seed, apart=apart)
        return {**done, "limit": task.seconds, "goal": task.goal}

    monkeypatch.setattr(to_target, "train", trained)
    return asked


def test_a_rate_is_tuned_with_one_seed_beyond_its_edges_and_others_are_reported(told: list[Any]):
    contest = Contest({}, lambda content: None)
    contest.hold("digits-cnn", TASKS["digits-cnn"], ["adamw", "optimizer"], seeds=2)
    tuned = [(rate, 0) for rate in (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 0.55)]
    assert [each[1:3] for each in told if each[0] == "adamw"] == [
        *tuned,
        *((rate, seed) for rate in (1.0, 0.55) for seed in (1, 2)),
    ]
    own = [each[1:4] for each in told if each[0] == "optimizer"]
    assert own == [(1.0, 0, False), *((1.0, seed, apart) for apart in (False, True) for seed in (1, 2))]
    assert "adamw" in RIVALS[TargetSettings(rivals=("optimizer",)).competitors()[0]].title.lower()


def test_an_interrupted_tuning_goes_on_as_if_it_had_not_been(told: list[Any]):
    kept: list[dict[str, Any]] = []
    Contest({}, lambda content: kept.append(dict(content["cells"]))).hold(
        "digits-cnn", TASKS["digits-cnn"], ["adamw"], seeds=1
    )
    whole = [each[:3] for each in told]
    for cells in kept:
        told.clear()
        Contest(cells, lambda content: None).hold("digits-cnn", TASKS["digits-cnn"], ["adamw"], seeds=1)
        assert [each[:3] for each in told] == whole[len(cells) :]


def test_a_long_task_reports_one_rate_and_no_rate_is_tuned_past_the_best(monkeypatch: pytest.MonkeyPatch):
    limits: dict[float, float] = {}

    def trained(
        task: Task, rival: Any, rate: float, seed: int, *, behind: float, apart: bool = False, **_: Any
    ) -> dict[str, Any]:
        assert behind == 22.5, "a quarter of the task's seconds, however many it is given"
        if seed == 0:
            limits[rate] = task.seconds
        found = {0.001: 80.0, 0.003: 40.0}.get(rate)
        seconds = found if found is not None and found <= task.seconds else None
        return {**cell(rate, seconds, 1.0, seed, apart=apart), "limit": task.seconds, "goal": task.goal}

    monkeypatch.setattr(to_target, "train", trained)
    contest = Contest({}, lambda content: None)
    contest.hold("character-gpt", replace(TASKS["character-gpt"], seconds=90.0), ["adamw"], seeds=2)
    assert [limits[rate] for rate in RATES] == [90.0, 90.0, 60.0, 60.0]
    cells = contest.content()["cells"].values()
    assert {each["limit"] for each in cells} == {90.0}, "it isn't trained again for having had less time"
    assert {each["rate"] for each in cells if each["seed"] > 0} == {0.003}


def test_a_rate_far_behind_the_best_one_of_a_long_task_is_given_up_early(monkeypatch: pytest.MonkeyPatch):
    asked: dict[float, int] = {}

    def trained(
        task: Task, rival: Any, rate: float, seed: int, *, beside: Any, apart: bool = False, **_: Any
    ) -> dict[str, Any]:
        asked.setdefault(rate, len(beside))
        made = {**cell(rate, None, {0.003: 0.5}.get(rate, 1.0), seed, apart=apart), "curve": [(0.0, 0, 1.0)] * 3}
        return {**made, "limit": task.seconds, "goal": task.goal}

    monkeypatch.setattr(to_target, "train", trained)
    for name, curves in (("character-gpt", [0, 3, 3, 3]), ("digits-cnn", [0, 0, 0, 0])):
        asked.clear()
        Contest({}, lambda content: None).hold(name, TASKS[name], ["adamw"], seeds=0)
        assert [asked[rate] for rate in RATES] == curves
    best_one = [(0.0, 0, 2.0), (1.0, 10, 1.0), (2.0, 20, 1.2), (9.0, 90, 0.1)]
    assert hopeless([(0.0, 0, 2.0), (2.0, 5, 1.6)], best_one)
    assert not hopeless([(0.0, 0, 2.0), (1.5, 4, 1.4), (2.0, 5, 1.8)], best_one), "it was near before"
    assert not hopeless([(0.0, 0, 2.0), (2.0, 5, 1.6)], [])


def test_a_training_ends_once_it_is_hopeless(monkeypatch: pytest.MonkeyPatch):
    """By a clock on which each step takes a second."""
    monkeypatch.setattr(to_target.time, "perf_counter", count().__next__)
    endless = replace(TASKS["digits-autoencoder"], goal=None, seconds=20.0, evaluation_period=2)
    lengths = [
        train(endless, RIVALS["sgd"], 0.0, 0, beside=[(0.0, 0, value)], behind=5.0)["curve"][-1][0]
        for value in (1e-9, 1.0)
    ]
    assert lengths == [6.0, 20.0]


def test_what_was_trained_for_another_goal_counts_no_more(told: list[Any]):
    contest = Contest({}, lambda content: None)
    contest.hold("digits-cnn", TASKS["digits-cnn"], ["adamw", "optimizer"], seeds=1)
    other = replace(TASKS["digits-cnn"], goal=0.5)
    contest.hold("digits-cnn", other, ["adamw", "optimizer"], seeds=1)
    assert {each["goal"] for each in contest.content()["cells"].values()} == {0.5}


def test_a_goal_that_others_set_is_known_before_kfdist_trains(told: list[Any]):
    contest = Contest({}, lambda content: None)
    contest.hold("mnist-autoencoder", TASKS["mnist-autoencoder"], ["sgd", "rs-kfac"], seeds=0)
    assert {goal for name, *_, goal in told if name == "sgd"} == {None}
    (last,) = {goal for name, *_, goal in told if name == "rs-kfac"}
    assert last == min(abs(rate - 1.0) for name, rate, *_ in told if name == "sgd")
    with pytest.raises(ConfigError, match="none of them was trained; add one"):
        Contest({}, lambda content: None).hold("mnist-autoencoder", TASKS["mnist-autoencoder"], ["rs-kfac"], seeds=0)


def test_what_is_known_is_not_trained_again_unless_it_had_less_time_or_another_goal():
    settings = TargetSettings(tasks=("digits-autoencoder",), rivals=("adamw",), seconds=1e-6, seeds=0)
    counts: list[int] = []
    known: dict[str, Any] = {}
    found = measure_target(settings, known, lambda content: counts.append(len(content["cells"])))
    assert counts == list(range(1, len(counts) + 1)) and len(counts) >= 4 and known == {}
    assert all(each["steps_done"] == TASKS["digits-autoencoder"].evaluation_period for each in found["cells"].values())
    measure_target(settings, found["cells"], lambda content: pytest.fail("everything is known"))
    for changed in ({"limit": 1e-9}, {"goal": 1.0}, {"data_version": "0"}):
        name = next(iter(found["cells"]))
        other = {**found["cells"], name: found["cells"][name] | changed}
        counts.clear()
        measure_target(settings, other, lambda content: counts.append(len(content["cells"])))
        assert counts == [len(found["cells"])]
    before = {name: {key: each[key] for key in each if key != "data_version"} for name, each in found["cells"].items()}
    measure_target(settings, before, lambda content: pytest.fail("cells that don't say are of a task's first data"))
    shown = describe(found)
    assert "digits autoencoder" in shown and "AdamW" in shown and "CNN" not in shown
    assert "adamw" in plot(found)


@pytest.mark.parametrize("rival", RIVALS)
def test_everyone_trains(rival: str):
    task = replace(TASKS["digits-autoencoder"], seconds=1e-6, evaluation_period=2)  # SOAP's first step is none
    chosen = RIVALS[rival]
    found = train(task, chosen, chosen.rates[0] if chosen.rates else 1e-3, 0)
    assert found["steps_done"] == (1 if chosen.whole else 2)
    assert found["seconds"] is None and found["last"] != found["curve"][0][2]


def test_a_reached_goal_ends_the_training():
    task = replace(TASKS["digits-autoencoder"], goal=1e9)
    found = train(task, RIVALS["sgd"], 0.1, 0)
    assert found["steps_done"] == 2 * task.evaluation_period and found["seconds"] == 0.0 and found["steps"] == 0


def test_where_weights_are_averaged_their_average_is_measured():
    plain = replace(TASKS["digits-autoencoder"], goal=None, seconds=1e-6, evaluation_period=3)
    averaged = replace(plain, average_decay=0.5)
    last = train(averaged, RIVALS["adamw"], 1e-3, 0)["last"]
    assert last != train(plain, RIVALS["adamw"], 1e-3, 0)["last"]

    model, batches, weights = plain.model(0), plain.batches(0), []
    with RIVALS["adamw"].training(plain, model, 1e-3) as step:
        for _ in range(3):
            step(next(batches))
            weights.append({name: each.clone() for name, each in model.state_dict().items()})
    # The average begins with the weights after the first step.
    first, second, third = weights
    model.load_state_dict({name: first[name] / 4 + second[name] / 4 + third[name] / 2 for name in first})
    assert last == pytest.approx(plain.value(model), rel=1e-5)


def test_an_unlucky_tuning_makes_nobody_slow():
    tuning = [cell(0.1, 1.0), cell(0.2, 3.0)]
    others = [cell(rate, seconds, seed=seed) for rate, seconds in ((0.1, 5.0), (0.2, 2.0)) for seed in (1, 2)]
    found = best([*tuning, *others])
    assert found is not None and (found["rate"], found["seconds"], found["seeds"]) == (0.2, 2.0, 2)
    found = best([*tuning, *others[:-1]])  # with fewer seeds it is no match yet
    assert found is not None and (found["rate"], found["seconds"]) == (0.1, 5.0)


def test_one_lucky_measurement_is_not_the_goal():
    below, above = (0.0, 0, 0.9), (0.0, 0, 1.1)
    assert held([above, below, below, below], 1.0)
    assert not held([below, below], 1.0) and not held([below, below, above], 1.0)
    assert not held([below, above, below, below], 1.0)


def test_another_files_content_is_refused(tmp_path: Path):
    file = tmp_path / "target.json"
    assert known_cells(file) == {}
    for content in ({"steps": 3}, {"cells": {"a": {"rival": "adamw", "one_core": False}}}):
        file.write_text(json.dumps(content))
        with pytest.raises(ConfigError, match="--out: .*target.json.*name another file"):
            known_cells(file)


def test_cells_of_rivals_that_are_no_more_are_left_out(tmp_path: Path):
    file = tmp_path / "target.json"
    adamw = {"rival": "adamw", "apart": False}
    file.write_text(json.dumps({"cells": {"a": adamw, "b": {**adamw, "rival": "ekfac-adam"}}}))
    assert "ekfac-adam" not in RIVALS and known_cells(file) == {"a": adamw}


@pytest.mark.parametrize("given", [{"tasks": ("x",)}, {"rivals": ("x",)}, {"seeds": -1}, {"seconds": 0.0}])
def test_wrong_settings_are_refused(given: dict[str, Any]):
    with pytest.raises(ConfigError, match=f"--{next(iter(given)).rstrip('s') if 's' in next(iter(given)) else ''}"):
        TargetSettings(**given)


def test_data_that_are_not_there_are_missed_before_anything_trains(tmp_path: Path):
    with pytest.raises(ConfigError, match="--data: .*train-images-idx3-ubyte.gz"):
        TargetSettings(tasks=("mnist-resnet",))
    with pytest.raises(ConfigError, match="--data: .*can't be read"):
        TargetSettings(tasks=("digits-cnn", "mnist-resnet"), folder=tmp_path)
    assert "mnist-resnet" not in dict(TargetSettings().work())


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """Five images of each part in files as MNIST's."""
    for part in ("train", "t10k"):
        pixels = bytes(range(256)) * 16
        with gzip.open(tmp_path / f"{part}-images-idx3-ubyte.gz", "wb") as file:
            file.write(bytes(16) + pixels[: 5 * 784])
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(bytes(8) + bytes([3, 1, 4, 1, 5]))
    return tmp_path


def test_mnists_files_are_read(mnist: Path):
    task = replace(TASKS["mnist-resnet"], folder=mnist)
    inputs, targets = task.examples(test=True)
    assert inputs.shape == (5, 1, 28, 28) and targets.tolist() == [3, 1, 4, 1, 5]
    assert inputs.flatten()[:256].equal(torch.arange(256) / 255)
    model = small_resnet()
    wrong = (model.eval()(inputs).argmax(1) != targets).float().mean()
    assert task.value(model) == pytest.approx(float(wrong))
    flat, again = replace(TASKS["mnist-autoencoder"], folder=mnist).examples(test=False)
    assert flat.shape == (5, 784) and flat is again


@pytest.mark.parametrize("kept", [0, 16, 1000])
def test_a_file_that_was_cut_off_is_refused(kept: int, mnist: Path):
    (mnist / "t10k-images-idx3-ubyte").write_bytes(bytes(kept))
    with pytest.raises(ConfigError, match=f"--data: t10k-images-idx3-ubyte in .* has {kept} bytes.*get it anew"):
        TargetSettings(tasks=("mnist-resnet",), folder=mnist)


@pytest.mark.parametrize("name", TASKS)
def test_a_model_of_a_task_takes_its_examples(name: str, mnist: Path):
    task = replace(TASKS[name], folder=mnist, most_measured=2)
    inputs, targets = task.examples(test=False)
    task.loss(task.model(0)(inputs[:2]), targets[:2]).backward()
    assert 0 <= task.value(task.model(0))
