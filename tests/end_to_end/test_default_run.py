"""`kfdist train` as a newcomer starts it: one real run, looked at from all sides while it lasts and afterwards."""

import json
import math
import time
import tomllib
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import Process, run
from tests.support.launches import Train, addresses, launch, summary_of
from tests.support.prometheus import PROMETHEUS, BoardPanel, Prometheus, concrete, needs_prometheus, panels

pytestmark = pytest.mark.timeout(300)


EMPTY = ("kfdist_graft_ratio", "kfdist_kl_clip_factor")
"""Metrics that this run lacks: its method gives directions a length of their own, and nothing grafts or clips them."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What was seen of the run.

    Attributes:
        directory: Its run directory.
        output: What it wrote to the terminal.
        family: Its processes while it trained.
        metrics: What /metrics said meanwhile.
        status: What `kfdist status --json` said meanwhile.
        panels: The queries of each panel of the dashboards, and what Prometheus said to them; empty without it.
        left: Its processes that outlived it.
        seconds: From its start to its end.
    """

    directory: Path
    output: str
    family: list[Process]
    metrics: str
    status: dict[str, Any]
    panels: dict[BoardPanel, dict[str, list[Any]]]
    left: list[Process]
    seconds: float

    @property
    def summary(self) -> dict[str, Any]:
        return summary_of(self.directory)


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    directory = tmp_path_factory.mktemp("default") / "run"
    started = time.monotonic()
    with launch(directory, report=True) as command, ExitStack() as stack:
        served = addresses(command)
        prometheus = None
        if PROMETHEUS is not None:
            target = urllib.parse.urlsplit(served.metrics).netloc
            prometheus = stack.enter_context(Prometheus(tmp_path_factory.mktemp("prometheus"), target))
        command.wait_for_line("step  50/")
        family = command.family()
        metrics = urllib.request.urlopen(served.metrics, timeout=5).read().decode()
        status = json.loads(run("status", "digits", "--json"))
        output = command.expect(0)
        histories = {
            panel: {each: prometheus.history(concrete(each, run="digits", interval="2s")) for each in panel.expressions}
            for panel in panels()
            if prometheus is not None
        }
        yield Observed(
            directory=directory,
            output=output,
            family=family,
            metrics=metrics,
            status=status,
            panels=histories,
            left=command.left_behind(),
            seconds=time.monotonic() - started,
        )


def test_it_ends_well_and_says_accuracy_staleness_and_where_the_files_are(observed: Observed):
    last, files, report = observed.output.splitlines()[-3:]
    assert "120 steps" in last and "test accuracy" in last and "staleness" in last
    assert str(observed.directory) in files
    assert report == f"report: {observed.directory / 'report.html'}"
    assert "The run is finished: 120 steps." in (observed.directory / "report.html").read_text(encoding="utf-8")


def test_it_learns(observed: Observed):
    assert observed.summary["metrics"]["test_accuracy"] >= 0.985


def test_every_process_is_in_its_place_while_it_trains(observed: Observed):
    titles = [process.title for process in observed.family]

    def count(*words: str) -> int:
        return sum(all(word in title for word in words) for title in titles)

    assert count("-m kfdist serve") == 1, titles
    assert count("-m kfdist pool") == 1, titles
    assert count("-m kfdist worker") == 2, titles
    assert count("-m kfdist.links.courier") == 2, titles
    assert count("ray::Owner") == 2, titles
    assert count("-m kfdist.owner.child") >= 2, titles


def test_nothing_is_left_of_it(observed: Observed):
    assert observed.left == []


def test_ranks_import_neither_ray_nor_grpc(observed: Observed):
    assert observed.summary["rank_modules_clean"] is True


def test_the_summary_has_the_promised_figures(observed: Observed):
    summary = observed.summary
    assert summary["status"] == "finished" and summary["steps"] == 120 and summary["seconds"] > 0
    assert set(summary["step_seconds"]) >= {"mean", "p50", "p99"}
    assert 0 <= summary["staleness_steps"]["p50"] <= summary["staleness_steps"]["max"]
    # Four blocks, due at step 0 and then every twenty steps with their phases.
    assert summary["inversions"]["completed"] >= 20 and summary["inversions"]["failed"] == 0
    assert summary["inversions"]["by_method"] == {"ekfac-adam": summary["inversions"]["completed"]}
    assert summary["owner_restarts"] == 0 and summary["restarts"] == {"controller": 0, "pool": 0}
    local = ("gradients", "statistics", "jobs", "results", "snapshots")
    assert all(summary["bytes"][purpose] > 0 for purpose in (*local, "to_owners", "from_owners"))
    assert summary["samples_lost"] == 0
    assert {"kfdist", "torch", "ray", "grpcio"} <= set(summary["versions"])


def test_both_ranks_end_with_the_same_parameters(observed: Observed):
    first, second = observed.summary["parameter_sha256"]
    assert first == second and len(first) == 64


def test_its_configuration_is_kept_and_says_where_the_controller_was(observed: Observed):
    config = tomllib.loads((observed.directory / "config.toml").read_text())
    assert config["optimizer"]["name"] == "kfdist"
    assert config["preconditioner"]["settings"] == {
        "dense": "ekfac-adam",
        "dense_settings": {"basis_period": 20},
        "wide": "ekfac-adam",
    }
    assert config["cluster"]["workers"] == 2 and config["cluster"]["owners"] == 2
    assert not config["control"]["address"].endswith(":0")


def test_its_progress_is_kept(observed: Observed):
    lines = [json.loads(line) for line in (observed.directory / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "staleness" in str(line) and "step" in line]
    assert steps and max(steps) == 120
    assert any((observed.directory / "checkpoints").iterdir())
    logs = {path.name for path in (observed.directory / "logs").iterdir()}
    assert logs >= {f"{name}.log" for name in ("controller", "pool", "rank-0", "rank-1")}
    assert sum(name.startswith("owner-") for name in logs) == 2


@pytest.mark.parametrize(
    "name",
    [
        "kfdist_staleness_steps{",
        "kfdist_staleness_seconds{",
        'kfdist_inversion_seconds_count{method="ekfac-adam"',
        "kfdist_steps_total{",
        "kfdist_step_seconds_count{",
        'kfdist_bytes_total{purpose="jobs"',
        'kfdist_bytes_total{purpose="to_owners"',
        'kfdist_bytes_total{purpose="from_owners"',
        "kfdist_samples_lost_total{",
        'kfdist_inversion_residual{block="',
        'kfdist_inversion_rank{block="',
        'kfdist_inversion_smallest_eigenvalue{block="',
        'kfdist_inversion_orthogonality_error{block="',
        'kfdist_inversion_rung{block="',
        "kfdist_adoptions_total{",
        "kfdist_build_info{",
    ],
)
def test_the_controller_exports_what_people_watch(observed: Observed, name: str):
    lines = [line for line in observed.metrics.splitlines() if line.startswith(name)]
    assert lines, observed.metrics
    # What was built is a fact about the controller, all else about a run.
    assert all('run="digits"' in line for line in lines) or name == "kfdist_build_info{"


def test_the_controller_exports_nothing_of_what_the_run_lacks(observed: Observed):
    assert [
        line for line in observed.metrics.splitlines() if line.startswith(tuple(f"{name}{{" for name in EMPTY))
    ] == []


def test_status_shows_the_run_while_it_trains(observed: Observed):
    assert observed.status["name"] == "digits"
    assert observed.status["step"] > 0
    assert observed.status["live_workers"] == 2 and observed.status["live_owners"] == 2
    assert 0 <= observed.status["gauges"]["kfdist_inversion_residual"] < 1e-2
    assert observed.status["gauges"]["kfdist_inversion_rank"] > 0


def test_the_same_command_again_says_that_the_run_is_finished_and_changes_nothing(observed: Observed, train: Train):
    before = (observed.directory / "summary.json").read_bytes()
    code, output = train("--set", f"run.dir={observed.directory}")
    assert code == 0, output
    assert "finished" in output and "run.steps" in output
    assert (observed.directory / "summary.json").read_bytes() == before


def test_another_configuration_does_not_resume_it(observed: Observed, train: Train):
    changes = ("--set", "optimizer.lr=0.07", "--set", "run.steps=200")
    code, output = train("--set", f"run.dir={observed.directory}", *changes)
    assert code == 2, output
    assert "optimizer.lr" in output and "accept_changes" in output


@needs_prometheus
def test_every_panel_of_the_dashboards_has_data(observed: Observed):
    assert len(observed.panels) >= 20
    empty = [
        (panel.board, panel.title, expression)
        for panel, histories in observed.panels.items()
        for expression, history in histories.items()
        if not any(name in expression for name in EMPTY)
        and not any(math.isfinite(float(value)) for series in history for _, value in series["values"])
    ]
    assert empty == []
