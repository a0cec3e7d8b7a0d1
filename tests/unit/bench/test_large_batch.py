"""What `benchmarks/large_batch.py` makes of its cells."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import large_batch
from benchmarks.large_batch import CURVES, METHODS, Measurement, batches_of, best_rate, describe, found_steps, measure


def _cells(method: str, batch: int, steps: dict[tuple[float, int], int | None], last: float = 0.5) -> dict[str, Any]:
    return {
        f"digits-cnn/{method}/{batch}/{rate:g}/{seed}": {"steps": found, "last": last}
        for (rate, seed), found in steps.items()
    }


def test_the_best_rate_is_the_tuning_seeds_and_the_steps_are_the_others():
    cells = _cells("AdamW", 32, {(0.01, 0): 50, (0.1, 0): None, (0.01, 1): 70, (0.01, 2): 60, (0.01, 3): None})
    assert best_rate(cells, "digits-cnn", "AdamW", 32) == 0.01
    assert found_steps(cells, "digits-cnn", "AdamW", 32) == (0.01, 70)


def test_where_most_seeds_never_arrive_there_are_no_steps():
    cells = _cells("AdamW", 32, {(0.01, 0): 50, (0.01, 1): None, (0.01, 2): None, (0.01, 3): 60})
    assert found_steps(cells, "digits-cnn", "AdamW", 32)[1] == math.inf


def test_a_batch_is_told_once_both_methods_have_it():
    one = {(0.01, seed): 40 for seed in range(4)}
    cells = _cells("AdamW", 32, one) | _cells("AdamW", 64, one) | _cells("kfdist.Optimizer", 32, one)
    assert batches_of(cells, "digits-cnn") == [32]
    assert [line.split()[:2] for line in describe(cells).splitlines()[2:]] == [["32", method] for method in METHODS]


def test_the_batch_is_doubled_until_neither_method_saves_a_tenth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    steps = {"AdamW": {32: 100, 64: 50, 128: 49, 256: 49}, "kfdist.Optimizer": {32: 40, 64: 39, 128: 30, 256: 29}}
    done: list[tuple[int, str]] = []

    def train(curve: Any, method: str, batch: int, rate: float, seed: int) -> dict[str, Any]:
        del curve, seed
        if (batch, method) not in done:
            done.append((batch, method))
        return {"steps": steps[method][batch] if rate == 0.01 else None, "last": 0.5}

    monkeypatch.setattr(large_batch, "train", train)
    measure(Measurement(tmp_path / "cells.json", seeds=1), "digits-cnn", None)
    assert [batch for batch, _ in done[::2]] == [32, 64, 128, 256]


def test_a_training_stops_at_its_goal():
    curve = CURVES["digits-cnn"]
    sooner = replace(curve, task=replace(curve.task, goal=0.15))
    found = large_batch.train(sooner, "kfdist.Optimizer", 128, 0.01, 1)
    assert found["steps"] is not None and 2 <= found["steps"] < 40 and found["last"] <= 0.15
