import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverse import KroneckerInverse
from kfdist.telemetry.durations import Durations
from kfdist.training.history import WINDOWS_PER_LENGTH, window_length
from tests.support.recorded import record


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = ("run.log_period=4", "run.steps=26", "checkpoint.period=13", "preconditioner.settings={rank=6}")
    return record(tmp_path_factory.mktemp("history") / "run", *overrides)


def test_windows_hold_every_step_once(run: Path) -> None:
    windows = [line for line in lines_of(run) if line["event"] == "window"]
    assert [line["step"] for line in windows] == [4, 8, 12, 16, 20, 24, 26]
    totals = [Durations.from_json(line["phases"]["total"]).count for line in windows]
    assert totals == [4, 4, 4, 4, 4, 4, 2]
    summary = json.loads((run / "summary.json").read_text())
    inversions = sum(Durations.from_json(found).count for line in windows for found in line["inversions"].values())
    assert inversions == summary["inversions"]["completed"] > 0
    assert windows[-1]["totals"]["adoptions"] == summary["adoptions"]
    assert windows[-1]["totals"]["bytes"] == summary["bytes"]
    assert max(value for line in windows for value in line["staleness"]) == summary["staleness_steps"]["max"]


def test_a_start_names_the_blocks_of_its_windows(run: Path) -> None:
    start, window, *_ = lines_of(run)
    assert start["event"] == "start" and len(start["blocks"]) == len(start["methods"]) == len(window["staleness"]) == 3
    assert set(window["diagnostics"]) == set(start["blocks"])


def test_lengths_of_steps_and_grafts_are_in_both_files(tmp_path: Path) -> None:
    overrides = ("run.log_period=6", "run.steps=24", "preconditioner.method=kfac-eigen", "preconditioner.settings={}")
    grafted = ("optimizer.name=kfdist", "optimizer.settings={graft='sgd'}", "preconditioner.kl_clip=0")
    run = record(tmp_path / "run", *overrides, *grafted)
    start, *windows = (line for line in lines_of(run) if line["event"] != "spectrum")
    last = windows[-1]
    for name in ("step_lengths", "graft_ratios"):
        assert set(last[name]) == set(start["blocks"]) and all(value > 0 for value in last[name].values())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    step = [line for line in metrics if line["event"] == "step"][-1]
    for name, values in (("step_length", last["step_lengths"]), ("graft_ratio", last["graft_ratios"])):
        assert step[name]["max"] == pytest.approx(max(values.values()), rel=1e-3)
        assert min(values.values()) * 0.999 <= step[name]["p50"] <= step[name]["max"]
    assert step["graft_replacements"] == 0 and step["kl_clip_factor"] is None


def test_spectra_are_of_the_inverses_at_checkpoints(run: Path) -> None:
    spectra = [line for line in lines_of(run) if line["event"] == "spectrum"]
    assert [line["step"] for line in spectra] == [13, 26]
    for factors in spectra[-1]["factors"].values():
        for factor in factors.values():
            indices, values = zip(*factor["points"], strict=True)
            assert indices[0] == 1 and indices[-1] <= min(6, factor["size"])
            assert list(values) == sorted(values, reverse=True)


def test_a_spectrum_that_cannot_be_computed_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(inverse: KroneckerInverse, memory: BlockMemory) -> dict[str, tuple[torch.Tensor, int]]:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(KroneckerInverse, "spectra", fail)
    run = record(tmp_path / "run", "run.steps=4", "preconditioner.method=kfac")
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    assert "lacks spectra of 3 blocks" in caplog.text and "no convergence" in caplog.text


def test_windows_grow_so_that_their_number_hardly_does() -> None:
    step = windows = 0
    while step < 10**7:
        step += window_length(step + 1, 10)
        windows += 1
        assert step % window_length(step, 10) == 0  # on which all ranks agree without a word, also after a resume
    assert windows < 15 * WINDOWS_PER_LENGTH
