import json
import logging
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kfdist.errors import ConfigError
from kfdist.training.trackers import tracker as trackers
from kfdist.training.trackers.tracker import Numbers, Tracker, TrackerFeed, numbers_of
from tests.support.recorded import record


def steps_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "step"]


class Kept(Tracker):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def start(self, config: Mapping[str, Any], step: int) -> None:
        self.calls.append(("start", config["run.name"], step))

    def log(self, numbers: Sequence[Numbers]) -> None:
        self.calls += [("log", step, dict(values)) for step, values in numbers]

    def close(self, status: str) -> None:
        self.calls.append(("close", status))


class Failing(Kept):
    def log(self, numbers: Sequence[Numbers]) -> None:
        for each in numbers:
            super().log([each])
            if each[0] == 3:
                raise ConnectionError("the server has gone")


class Hanging(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.end = threading.Event()

    def log(self, numbers: Sequence[Numbers]) -> None:
        self.end.wait()


def track(monkeypatch: pytest.MonkeyPatch, tracker: Tracker) -> None:
    def make(config, standing) -> TrackerFeed:
        return TrackerFeed({"it": tracker}, {"run.name": config.run.name}, standing.step)

    monkeypatch.setattr("kfdist.training.worker.make_trackers", make)


def test_a_tracker_is_told_what_metrics_jsonl_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept = Kept()
    track(monkeypatch, kept)
    run = record(tmp_path / "run", "run.steps=4")
    assert (kept.calls[0], kept.calls[-1]) == (("start", "digits", 0), ("close", "finished"))
    logged = [(step, values["loss"]) for name, step, values in kept.calls[1:-1] if "loss" in values]
    assert logged == [(line["step"], line["loss"]) for line in steps_of(run)]
    summary = json.loads((run / "summary.json").read_text())
    assert kept.calls[-2][2]["test_accuracy"] == summary["metrics"]["test_accuracy"]


def test_numbers_have_one_level_and_are_finite() -> None:
    line = {"event": "step", "time": 1.0, "step": 3, "loss": 0.5, "noise_scale": None, "staleness": {"max": 4}}
    assert numbers_of(line) == {"loss": 0.5, "staleness/max": 4.0}
    averaged = {"event": "evaluation", "step": 3, "weights": "averaged", "test_loss": 1}
    assert numbers_of(averaged) == {"averaged_test_loss": 1.0}
    assert numbers_of({"event": "checkpoint", "step": 3, "bytes": 7}) == {}


def test_a_run_goes_on_without_a_tracker_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failing = Failing()
    track(monkeypatch, failing)
    run = record(tmp_path / "run", "run.steps=8")
    assert [line["step"] for line in steps_of(run)] == list(range(1, 9))
    assert [call[1] for call in failing.calls if call[0] == "log"] == [1, 2, 3]
    [warning] = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert warning.getMessage() == (
        "it gets no more of the run's numbers (ConnectionError: the server has gone); metrics.jsonl has them all"
    )


def test_a_tracker_that_hangs_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hanging = Hanging()
    monkeypatch.setattr(trackers, "_CLOSE_SECONDS", 0.05)
    track(monkeypatch, hanging)
    try:
        run = record(tmp_path / "run", "run.steps=4")
        assert len(steps_of(run)) == 4
        assert "it took more than 0.05 s to end" in caplog.text
    finally:
        hanging.end.set()


def test_all_trackers_together_have_seconds_and_less_where_ranks_are_killed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "_CLOSE_SECONDS", 1000.0)
    monkeypatch.setattr(trackers, "_HURRIED_CLOSE_SECONDS", 0.05)
    hanging = {name: Hanging() for name in ("one", "two")}
    told = TrackerFeed(hanging, {"run.name": "digits"}, 0)
    waits: list[float | None] = []
    join = threading.Thread.join
    monkeypatch.setattr(threading.Thread, "join", lambda thread, limit=None: (waits.append(limit), join(thread, limit)))
    try:
        told.tell({"event": "step", "step": 1, "loss": 1.0})
        told.close("stopped")
    finally:
        for each in hanging.values():
            each.end.set()
    assert caplog.text.count("it took more than 0.05 s to end") == 2
    assert 0 < (waits[0] or 0) <= 0.05 and waits[1] == 0.0


def test_a_failure_is_recorded_before_trackers_are_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Looking(Kept):
        def close(self, status: str) -> None:
            recorded = json.loads((tmp_path / "run" / "summary.json").read_text())
            self.calls.append((status, recorded["status"], recorded["error"]))

    def fail(*given: Any, **named: Any) -> None:
        raise ValueError("a bug")

    looking = Looking()
    track(monkeypatch, looking)
    monkeypatch.setattr("kfdist.training.worker.summarise", fail)
    with pytest.raises(ValueError, match="a bug"):
        record(tmp_path / "run", "run.steps=2")
    assert looking.calls[-1] == ("failed", "failed", "ValueError: a bug")


def test_a_tracker_gets_all_that_has_come_while_it_was_busy_at_once() -> None:
    class Slow(Kept):
        def start(self, config: Mapping[str, Any], step: int) -> None:
            ready.wait()

        def log(self, numbers: Sequence[Numbers]) -> None:
            self.calls.append(tuple(step for step, _ in numbers))

    ready, slow = threading.Event(), Slow()
    told = TrackerFeed({"it": slow}, {"run.name": "digits"}, 0)
    for step in (1, 2, 3):
        told.tell({"event": "step", "step": step, "loss": 1.0})
    ready.set()
    told.close("finished")
    assert slow.calls[0][0] == 1 and [step for call in slow.calls[:-1] for step in call] == [1, 2, 3]
    assert slow.calls[-1] == ("close", "finished")


def test_values_that_nobody_takes_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    hanging = Hanging()
    told = TrackerFeed({"it": hanging}, {"run.name": "digits"}, 0)
    try:
        for step in range(2_000):
            told.tell({"event": "step", "step": step, "loss": 1.0})
        assert caplog.text.count("1000 values wait for it") == 1
    finally:
        hanging.end.set()
    told.close("finished")


def test_a_missing_package_is_told_before_anything_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'kfdist\[tensorboard,mlflow\]'") as refused:
        record(tmp_path / "run", 'run.trackers=["tensorboard", "mlflow"]')
    assert refused.value.path == "run.trackers"
    assert not (tmp_path / "run").exists()


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs TensorBoard: pip install 'kfdist[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    go = partial(record, tmp_path / "run", 'run.trackers=["tensorboard"]')
    run = go("run.steps=6")
    lost = SummaryWriter(str(run / "tensorboard"))  # as a start leaves it that is killed after its checkpoint
    lost.add_scalar("loss", 1e6, 8)
    lost.close()
    go("run.steps=12")
    read = EventAccumulator(str(run / "tensorboard"))
    read.Reload()
    found = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in read.Scalars("loss")]
    assert found == [(line["step"], line["loss"]) for line in steps_of(run)]
    assert {"staleness/max", "phase_seconds/reduce", "test_accuracy", "lr"} <= set(read.Tags()["scalars"])
    assert b"rs-kfac" in read.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0]


def test_mlflow_has_a_resumed_run_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="needs MLflow: pip install 'kfdist[mlflow]'")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("MLFLOW_ALLOW_FILE_STORE", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "true")
    from mlflow.tracking import MlflowClient

    go, begun = partial(record, tmp_path / "run", 'run.trackers=["mlflow"]'), time.time() - 0.001  # it has milliseconds
    run = go("run.steps=6")
    client = MlflowClient(tracking_uri=(run / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    earlier = shutil.copytree(run, tmp_path / "earlier")
    go("run.steps=12")
    [found] = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("digits", "FINISHED")
    assert found.data.params["preconditioner.method"] == "rs-kfac"
    assert found.data.tags["mlflow.source.name"] == "kfdist"
    assert found.data.tags["kfdist.directory"] == str(run)
    assert begun <= found.info.start_time / 1000 <= steps_of(run)[0]["time"]
    losses = [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, "loss")]
    assert losses == [(line["step"], line["loss"]) for line in steps_of(run)]
    # As if killed at step 12, with the checkpoint of step 6 as the newest.
    shutil.rmtree(earlier / "mlruns")
    for told in ("mlruns", "mlflow.json"):
        (run / told).replace(earlier / told)
    shutil.rmtree(run)
    earlier.replace(run)
    go("run.steps=13")
    assert [metric.step for metric in client.get_metric_history(found.info.run_id, "loss")] == list(range(1, 14))
    client.delete_run(found.info.run_id)
    go("run.steps=14")  # a new one, as the old one is gone
    [other] = client.search_runs([experiment.experiment_id])
    assert other.info.run_id != found.info.run_id


@pytest.mark.slow
@pytest.mark.parametrize("module", ["tensorboard", "mlflow"])
def test_a_rank_stays_free_of_grpc_and_ray(module: str) -> None:
    pytest.importorskip(module)
    imported = {"tensorboard": "torch.utils.tensorboard", "mlflow": "mlflow.tracking"}[module]
    script = f"import sys, {imported}; print(sorted({{'grpc', 'ray'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "[]\n"
