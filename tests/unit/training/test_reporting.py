"""What a run writes about itself: lines on the terminal, metrics.jsonl, summary.json."""

import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from kfdist.training.progress import PlainProgress, ProgressLine
from kfdist.training.reporting import MetricsLog, make_progress
from kfdist.training.summary import modules_clean, parameter_sha256, step_statistics, write_summary

LINE = ProgressLine(
    step=20, total_steps=120, loss=0.25, metrics={"accuracy": 0.875}, staleness=14, steps_per_second=31.5
)


def test_a_line_says_loss_accuracy_and_staleness():
    stream = io.StringIO()
    progress = make_progress(worker_rank=0, total_steps=120, stream=stream)
    assert isinstance(progress, PlainProgress)
    progress.show(LINE)
    assert stream.getvalue() == "step  20/120  loss   0.2500  accuracy  87.50%  staleness  14    31.5 steps/s\n"


def test_other_ranks_are_silent():
    stream = io.StringIO()
    progress = make_progress(worker_rank=1, total_steps=1, stream=stream)
    progress.say("an event happened")
    progress.show(LINE)
    progress.close()
    assert stream.getvalue() == ""


def test_the_log_is_one_object_a_line_and_grows_from_start_to_start(tmp_path: Path):
    for step in (1, 2):
        log = MetricsLog(tmp_path)
        log.write("step", step=step, loss=math.nan, staleness={"max": math.inf, "p50": 3})
        # Readable at once, not only after closing.
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        log.close()
    assert [(line["event"], line["step"], line["loss"]) for line in lines] == [("step", 1, None), ("step", 2, None)]
    assert lines[0]["staleness"] == {"max": None, "p50": 3}
    MetricsLog(None).write("step", step=3)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_step_statistics_are_nearest_ranks():
    seconds = [float(value) for value in range(1, 101)]
    assert step_statistics(seconds[::-1]) == {"mean": 50.5, "p50": 50.0, "p99": 99.0}
    assert step_statistics([2.0]) == {"mean": 2.0, "p50": 2.0, "p99": 2.0}
    assert step_statistics([]) == {"mean": None, "p50": None, "p99": None}


def test_the_digest_of_parameters_sees_every_bit_name_and_shape():
    weight = torch.arange(4.0)
    base = parameter_sha256([("a", weight), ("b", torch.zeros(1))])
    assert base == parameter_sha256([("b", torch.zeros(1)), ("a", weight.clone())])
    changed = weight.clone()
    changed.view(torch.int32)[3] ^= 1
    others = [
        [("a", changed), ("b", torch.zeros(1))],
        [("a", weight.view(2, 2)), ("b", torch.zeros(1))],
        [("c", weight), ("b", torch.zeros(1))],
        [("a", weight.to(torch.bfloat16)), ("b", torch.zeros(1))],
        [("a", weight), ("b", -torch.zeros(1))],
    ]
    assert len({base, *(parameter_sha256(other) for other in others)}) == 6


def test_clean_modules_means_neither_ray_nor_grpc(monkeypatch: pytest.MonkeyPatch):
    for name in ("ray", "grpc"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert modules_clean()
    monkeypatch.setitem(sys.modules, "grpc", sys)
    assert not modules_clean()


def test_a_full_disk_loses_lines_but_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = MetricsLog(tmp_path)
    log.write("step", step=1)
    log.write("step", step=2)
    log.close()
    assert log.lost == 2
    assert caplog.text.count("metrics.jsonl can't be written") == 1


def test_a_line_that_a_killed_process_left_unfinished_costs_no_later_one(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "start"}\n{"event": "st')
    log = MetricsLog(tmp_path)
    log.write("start", step=12)
    log.close()
    first, torn, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert (json.loads(first)["event"], torn) == ("start", '{"event": "st')
    assert json.loads(second)["step"] == 12


def test_a_summary_is_json_whatever_the_numbers_are(tmp_path: Path):
    write_summary(tmp_path, {"steps": 1, "metrics": {"test_loss": math.nan, "noise": [math.inf, -math.inf, 0.5]}})
    told = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert told == {"steps": 1, "metrics": {"test_loss": None, "noise": [None, None, 0.5]}}
