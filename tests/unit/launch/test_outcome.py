import fcntl
import json
import os
import sys
import time
from pathlib import Path

import pytest

from kfdist.config import load_config
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.launch import outcome
from kfdist.launch.launcher import Launch
from kfdist.launch.outcome import (
    add_to_summary,
    child_fault,
    ending_of,
    longest_checkpoint,
    remove_untrained,
    report_line,
)
from kfdist.launch.terminal import StopRequests, Terminal, summary_line
from kfdist.system.files import make_directory
from kfdist.system.processes import Child, Command
from kfdist.system.run_summary import read_summary
from kfdist.training.reporting import MetricsLog
from tests.support.waits import eventually


def _child(tmp_path: Path, name: str, script: str) -> Child:
    log = tmp_path / f"{name.replace(' ', '-')}.log"
    return Child(Command(name=name, line=(sys.executable, "-c", script), environment=dict(os.environ), log=log))


def _ended_child(tmp_path: Path, script: str) -> tuple[Child, int]:
    child = _child(tmp_path, "rank 1", script)
    deadline = time.monotonic() + 10
    while (code := child.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return child, code


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (2, ConfigError, "run.steps: is 0; it must be at least 1"),
        (1, EnvironmentFault, "run.steps: is 0; it must be at least 1\n(said by rank 1)"),
    ],
)
def test_a_child_that_gave_a_reason_is_quoted(tmp_path: Path, code: int, kind: type[Exception], words: str):
    said = "noise\\nkfdist: run.steps: is 0; it must be at least 1"
    fault = child_fault(*_ended_child(tmp_path, f"print('{said}'); raise SystemExit({code})"), "while training")
    assert type(fault) is kind and str(fault) == words


def test_a_child_that_crashed_is_shown_by_the_end_of_its_log(tmp_path: Path):
    ended = _ended_child(tmp_path, "print('deep trouble'); import sys, os; sys.stdout.flush(); os.abort()")
    fault = child_fault(*ended, "while training", "run it again")
    assert isinstance(fault, EnvironmentFault)
    first, *log, advice = str(fault).splitlines()
    assert first == f"rank 1 was killed by SIGABRT while training; the end of its log ({tmp_path / 'rank-1.log'}):"
    assert log[0] == "deep trouble" and advice == "run it again"


def test_the_rank_that_the_others_waited_for_is_quoted_beside_the_one_that_gave_up(monkeypatch, tmp_path: Path):
    launch = Launch(load_config(None, overrides=[f"run.dir={tmp_path}"]), Terminal(as_json=True), StopRequests())
    waits = "import time; print('WARNING rank=1: rank 1 has waited 290 s for a batch', flush=True); time.sleep(600)"
    deaf = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {waits}"
    monkeypatch.setattr("kfdist.launch.launcher.FAILURE_SECONDS", 0.1)
    monkeypatch.setattr("kfdist.launch.launcher.reap_orphans", lambda children: None)  # of this process
    scripts = {"rank 0": "raise RuntimeError('timed out')", "rank 1": deaf, "rank 2": "import time; time.sleep(600)"}
    launch._ranks = [_child(tmp_path, name, script) for name, script in scripts.items()]
    eventually(lambda: (launch._ranks[0].poll(), launch._ranks[1].log_tail()), all)
    first, *_, held, advice = str(launch._rank_failure(launch._ranks[:1])).splitlines()
    assert first.startswith("rank 0 exited with 1 while training")
    words = "WARNING rank=1: rank 1 has waited 290 s for a batch"
    assert held == f"rank 1 didn't end by itself; its log ends with: {words}"
    assert advice == "run the same command again to resume from the newest checkpoint"


def test_a_child_that_died_in_silence_is_named_all_the_same(tmp_path: Path):
    fault = child_fault(*_ended_child(tmp_path, "import os; os.kill(os.getpid(), 9)"), "before it was ready")
    assert str(fault) == "rank 1 was killed by SIGKILL before it was ready; its log is empty"


def test_a_launch_that_never_trained_leaves_no_directory(tmp_path: Path):
    run = tmp_path / "runs" / "it"
    made = make_directory(run / "logs")
    (run / "logs" / "rank-0.log").write_text("...")
    (run / "control.sqlite").write_text("...")
    remove_untrained(made, unless_trained=run)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lock", ["lock", "control.sqlite.lock"])
def test_a_launch_that_gives_way_to_another_one_leaves_it_its_directory(tmp_path: Path, lock: str):
    run = tmp_path / "runs" / "it"
    made = make_directory(run / "logs")  # by this launch, for both began at the same moment
    with (run / lock).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        remove_untrained(made, unless_trained=run)
        assert (run / "logs").exists() and (run / lock).exists()
    remove_untrained(made, unless_trained=run)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("trace", ["checkpoints", "metrics.jsonl"])
def test_a_launch_that_trained_keeps_everything(tmp_path: Path, trace: str):
    run = tmp_path / "runs" / "it"
    made = make_directory(run / "logs")
    (run / trace).mkdir()
    remove_untrained(made, unless_trained=run)
    assert (run / trace).exists() and (run / "logs").exists()


@pytest.mark.parametrize(("steps", "left"), [(0, False), (3, True)])
def test_a_launch_stopped_in_its_first_wait_leaves_no_directory(tmp_path: Path, steps: int, left: bool):
    run = tmp_path / "runs" / "it"
    made = make_directory(run / "logs")
    (run / "checkpoints").mkdir()
    (run / "summary.json").write_text(json.dumps({"status": "stopped", "steps": steps}))
    remove_untrained(made, unless_trained=run)
    assert run.exists() == left


def test_only_what_the_launch_made_is_removed(tmp_path: Path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "other").write_text("precious")
    run = tmp_path / "runs" / "it"
    made = make_directory(run / "logs")
    remove_untrained(made, unless_trained=run)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]
    run.mkdir()
    (run / "notes.txt").write_text("precious")
    remove_untrained(make_directory(run / "logs"), unless_trained=run)
    assert [path.name for path in run.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("run", [Path("/proc/kfdist"), Path("/tmp") / ("x" * 300)])
def test_a_directory_that_cannot_be_made_or_looked_at_is_the_machines_fault(run: Path):
    with pytest.raises(EnvironmentFault, match="another run.dir"):
        make_directory(run / "logs")


def test_the_summary_is_completed_where_there_is_one(tmp_path: Path):
    assert add_to_summary(tmp_path, restarts={}) == {} == read_summary(tmp_path)
    assert not (tmp_path / "summary.json").exists()
    (tmp_path / "summary.json").write_text(json.dumps({"status": "finished", "owner_restarts": 0}))
    assert add_to_summary(tmp_path, owner_restarts=2) == {"status": "finished", "owner_restarts": 2}
    assert read_summary(tmp_path)["owner_restarts"] == 2


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b"\xff\x00"])
def test_a_summary_that_is_damaged_is_no_reason_not_to_resume(tmp_path: Path, damaged: bytes):
    (tmp_path / "summary.json").write_bytes(damaged)
    assert read_summary(tmp_path) == {} == add_to_summary(tmp_path, restarts={})


def test_the_summary_in_a_line():
    summary = {
        "status": "finished",
        "steps": 120,
        "seconds": 14.26,
        "metrics": {"test_accuracy": 0.98607},
        "staleness_steps": {"p50": 12, "max": 16},
    }
    assert summary_line(summary) == (
        "finished: 120 steps in 14.3 s, test accuracy 98.61 %, staleness 12 steps (median), 16 (max)"
    )
    without = {"status": "stopped", "steps": 3, "seconds": 1.0, "staleness_steps": {"p50": None, "max": None}}
    assert summary_line(without) == "stopped: 3 steps in 1.0 s"
    assert summary_line({**without, "unsaved_steps": 0}) == summary_line(without)
    assert summary_line({**without, "unsaved_steps": 1}) == (
        "stopped: 3 steps in 1.0 s, but the last step is in no checkpoint; the same command makes it anew from step 2"
    )


def test_how_long_checkpoints_took_is_read_from_the_end_of_what_the_run_told(tmp_path: Path):
    assert longest_checkpoint(tmp_path) == 0.0
    log = MetricsLog(tmp_path)
    log.write("checkpoint", step=1, seconds=900.0)
    for step in range(40_000):  # 2 MB
        log.write("step", step=step)
    assert longest_checkpoint(tmp_path) == 900.0
    for seconds in (2.5, 7.0, 3.0):
        log.write("checkpoint", step=2, seconds=seconds)
    with (tmp_path / "metrics.jsonl").open("a") as torn:
        torn.write('{"event": "checkpoint", "seconds": 80')
    assert longest_checkpoint(tmp_path) == 7.0


def test_a_report_that_fails_is_told_in_one_line(tmp_path: Path) -> None:
    assert report_line(tmp_path, unless=lambda: False) == ""
    (tmp_path / "metrics.jsonl").write_text('{"event": "start", "time": 1.0, "step": 0}\n')
    (tmp_path / "report.html").mkdir()
    line = report_line(tmp_path, unless=lambda: False)
    assert line.startswith(f"no report (the report can't be written to {tmp_path / 'report.html'}") and "\n" not in line
    assert line.endswith(f"`kfdist report {tmp_path}` tries again")


def test_nobody_waits_for_a_report_without_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setattr(outcome, "module_command", lambda *_: [sys.executable, "-c", "import time; time.sleep(1000)"])
    asked = iter([False, False, True])
    assert report_line(tmp_path, unless=lambda: next(asked)) == ""
    monkeypatch.setattr(outcome, "REPORT_SECONDS", 0.0)
    assert report_line(tmp_path, unless=lambda: False).startswith("no report (it took more than 0 s);")


def test_a_report_ends_with_its_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").touch()
    # What `kfdist` finds in this variable, it watches (system/lifetime.py).
    script = "import os, sys; sys.exit('kfdist: ' + os.environ['KFDIST_PARENT_PID'])"
    monkeypatch.setattr(outcome, "module_command", lambda *_: [sys.executable, "-c", script])
    assert report_line(tmp_path, unless=lambda: False).startswith(f"no report ({os.getpid()});")


@pytest.mark.parametrize(
    ("left", "failed", "ended", "added"),
    [
        (
            {"status": "running"},
            "rank 1 was killed (log):\nlast",
            "",
            {"status": "failed", "error": "rank 1 was killed (log)"},
        ),
        ({"status": "failed", "error": "peer lost"}, "rank 1 was killed", "", {"ended": "rank 1 was killed"}),
        ({"status": "failed", "error": "rank 1: no disk"}, "no disk", "", {}),
        ({"status": "stopped"}, "no owners", "", {"ended": "no owners"}),
        ({"status": "running"}, "", "rank 0 hung", {"ended": "rank 0 hung"}),
        ({"status": "finished"}, "", "", {}),
    ],
)
def test_the_launcher_says_what_ranks_could_not(left: dict, failed: str, ended: str, added: dict) -> None:
    assert ending_of(left, failed=failed, ended=ended) == added
