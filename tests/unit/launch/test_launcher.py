"""What `kfdist train` checks before it starts anything."""

import datetime
import fcntl
import json
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kfdist.config import load_config
from kfdist.errors import EnvironmentFault, ExitCode
from kfdist.launch import launcher
from kfdist.launch.launcher import STOP_RANKS_SECONDS, Launch, train
from kfdist.launch.terminal import StopRequests, Terminal
from kfdist.rpc.certificates import Authority
from kfdist.system.credentials import Role
from kfdist.training.reporting import MetricsLog


@pytest.mark.parametrize("role", Role)
def test_a_certificate_that_no_process_could_use_is_found_before_one_is_started(
    certificates: Path, tmp_path: Path, role: Role
):
    directory = shutil.copytree(certificates, tmp_path / "certificates")
    pem = Authority.read(directory).issue(role, valid=datetime.timedelta(days=-1))
    (directory / role.file_name).write_bytes(pem)
    given = [f"run.dir={tmp_path / 'run'}", f"security.certificates={directory}", "control.address=127.0.0.1:0"]
    config = load_config(None, overrides=[*given, "control.metrics_address=127.0.0.1:0"], environment={})
    with pytest.raises(EnvironmentFault, match=rf"{role.value}\.pem expired on .* \(node "):
        train(config, Terminal(as_json=True), StopRequests())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("device", "there", "words"),
    [
        ("cuda", 0, 'run.device is "cuda", and torch .* sees no GPU here'),
        ("auto", 1, "cluster.workers is 2, each takes a GPU, and this machine has 1; set cluster.workers = 1"),
        ("auto", 2, ""),
        ("auto", 0, ""),
        ("cpu", 1, ""),
    ],
)
def test_ranks_without_a_gpu_are_found_before_one_is_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, there: int, words: str
):
    counted = max(there, 1)  # by the driver's library, perhaps, though torch can't use any
    monkeypatch.setattr(torch.cuda, "device_count", lambda: counted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(there))
    monkeypatch.setattr(launcher, "check_launch", lambda config: "")
    monkeypatch.setattr(Launch, "run", lambda launch: 75)
    config = load_config(None, overrides=[f"run.dir={tmp_path / 'run'}", f"run.device={device}"], environment={})
    if words:
        with pytest.raises(EnvironmentFault, match=words):
            train(config, Terminal(as_json=True), StopRequests())
    else:
        assert train(config, Terminal(as_json=True), StopRequests()) == 75
    monkeypatch.setattr(launcher, "check_launch", lambda config: "done before")
    monkeypatch.setattr(launcher, "read_summary", lambda directory: {})
    assert train(config, Terminal(as_json=True), StopRequests()) == 0, "what has finished needs no device"


@pytest.mark.parametrize("before", [True, False])
def test_a_launch_can_be_stopped_in_its_checks(monkeypatch, tmp_path: Path, capsys, before: bool):
    """Listing the images of a large data set takes minutes."""
    requests = StopRequests()

    def check(config: object) -> str:
        assert not before, "it was asked to stop before"
        requests.ask(signal.SIGINT, None)
        pytest.fail("the checks went on")

    monkeypatch.setattr(launcher, "check_launch", check)
    monkeypatch.setattr(Launch, "run", lambda launch: pytest.fail("the launch was started"))
    if before:
        requests.ask(signal.SIGTERM, None)
    config = load_config(None, overrides=[f"run.dir={tmp_path / 'run'}"], environment={})
    assert train(config, Terminal(as_json=False), requests) == ExitCode.RESUMABLE
    assert "stopped before anything was started" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    requests.ask(signal.SIGINT, None)
    assert requests.count == 2, "outside of the checks a request is only counted"


@pytest.mark.parametrize(
    ("given", "patience"), [(0.0, STOP_RANKS_SECONDS + 60.0), (10.0, STOP_RANKS_SECONDS + 60.0), (100.0, 100.0)]
)
def test_ranks_have_time_to_stop_by_what_their_checkpoints_took(monkeypatch, tmp_path: Path, given, patience):
    MetricsLog(tmp_path).write("checkpoint", step=50, seconds=20.0)
    overrides = [f"run.dir={tmp_path}", f"checkpoint.stop_seconds={given}"]
    launch = Launch(load_config(None, overrides=overrides, environment={}), Terminal(as_json=True), StopRequests())
    seen = []
    monkeypatch.setattr(launch, "_end_children", lambda children, seconds: seen.append(seconds))
    launch._stop_ranks()
    assert seen == [patience]


@pytest.mark.parametrize(
    ("found", "written", "code", "told"),
    [
        ("", '{"status": "finished", "start": 1}', ExitCode.DONE, False),  # they only waited for a controller that hung
        ("", '{"status": "running", "start": 1}', ExitCode.RESUMABLE, True),
        # Nothing of this launch: they were still starting.
        ('{"status": "finished", "start": 1}', '{"status": "finished", "start": 1}', ExitCode.RESUMABLE, False),
        ('{"status": "finished", "start": 1}', '{"status": "finished", "start": 2}', ExitCode.DONE, False),
    ],
)
def test_ranks_that_had_to_be_killed_after_their_last_step_have_finished(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    found: str,
    written: str,
    code: int,
    told: bool,
):
    summary = tmp_path / "summary.json"
    if found:
        summary.write_text(found)
    launch = Launch(load_config(None, overrides=[f"run.dir={tmp_path}"]), Terminal(as_json=True), StopRequests())
    killed = SimpleNamespace(name="rank 0", poll=lambda: -signal.SIGKILL)
    monkeypatch.setattr(launch, "_ranks", [killed])
    monkeypatch.setattr(launch, "_end_children", lambda *_: summary.write_text(written))
    assert launch._stop_ranks() == code
    assert ("instead of writing a checkpoint" in capsys.readouterr().err) == told


@pytest.mark.parametrize(
    ("unsaved_steps", "code", "told"),
    [
        (None, ExitCode.DONE, False),
        (0, ExitCode.DONE, False),
        (10, ExitCode.ENVIRONMENT, True),
        (10, ExitCode.RESUMABLE, True),
    ],
)
def test_a_launch_says_whether_its_last_steps_are_in_no_checkpoint(
    tmp_path: Path, capsys, unsaved_steps: int | None, code: int, told: bool
):
    overrides = [f"run.dir={tmp_path}", "run.report=false"]
    launch = Launch(load_config(None, overrides=overrides), Terminal(as_json=False), StopRequests())
    summary = {"status": "finished", "steps": 20, **({} if unsaved_steps is None else {"unsaved_steps": unsaved_steps})}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    asked = code if code == ExitCode.RESUMABLE else ExitCode.DONE
    assert launch._conclude(asked) == code
    words = "the last 10 steps are in no checkpoint; the same command makes them anew from step 10"
    assert (words in "".join(capsys.readouterr())) == told


@pytest.mark.parametrize("asked_for", [True, False])
@pytest.mark.parametrize(
    ("raises", "requests", "trains", "words"),
    [
        (
            EnvironmentFault("rank 1 was killed by SIGKILL; the end of its log:\n..."),
            0,
            True,
            "failed: rank 1 was killed",
        ),
        (launcher.StopAsked(), 1, True, "stopped before the last step; .*\nreport: "),
        (launcher.KillAsked(), 2, True, ""),
        (EnvironmentFault("the pool wasn't ready"), 0, False, ""),
    ],
)
def test_a_launch_that_trained_leaves_a_report_however_it_ends(
    monkeypatch, tmp_path: Path, capsys, raises: Exception, requests: int, trains: bool, words: str, asked_for: bool
):
    (tmp_path / "metrics.jsonl").touch()  # of an earlier start
    asked = StopRequests()
    overrides = [f"run.dir={tmp_path}", f"run.report={str(asked_for).lower()}"]
    launch = Launch(load_config(None, overrides=overrides), Terminal(as_json=False), asked)

    def end() -> None:
        if trains:
            (tmp_path / "summary.json").write_text('{"status": "running", "start": 1}')
        asked.count = requests
        raise raises

    monkeypatch.setattr(launcher, "become_subreaper", lambda: None)
    monkeypatch.setattr(launch, "_start", end)
    monkeypatch.setattr(launch, "_end", lambda: None)
    pages = []
    monkeypatch.setattr(
        launcher,
        "report_line",
        lambda directory, unless: pages.append(launcher.read_summary(directory)) or "report: it",
    )
    if isinstance(raises, EnvironmentFault):
        with pytest.raises(EnvironmentFault, match=str(raises)[:10]):
            launch.run()
    else:
        launch.run()
    said = capsys.readouterr().out
    told = "".join(f"{page['status']}: {page.get('error', '')}\n" for page in pages) + said
    assert bool(pages) == (asked_for and bool(words))
    assert re.search(words, told) if asked_for else "report" not in said


@pytest.mark.parametrize("held", [True, False])
def test_a_launch_that_fails_beside_another_leaves_the_others_summary(tmp_path: Path, held: bool):
    """Both were started at once, and this one's controller found the file in use when the other one's ranks began."""
    launch = Launch(load_config(None, overrides=[f"run.dir={tmp_path}"]), Terminal(as_json=True), StopRequests())
    summary = {"status": "running", "start": 1}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with (tmp_path / "lock").open("w") as lock:
        if held:
            fcntl.flock(lock, fcntl.LOCK_EX)
        launch._complete_summary(failed="another controller has the file")
    found = json.loads((tmp_path / "summary.json").read_text())
    assert (found == summary) == held
    assert held or found["status"] == "failed"


def test_checks_that_take_long_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    """As the listing of a folder does whose file system doesn't answer; nothing was said, without an end."""
    monkeypatch.setattr(launcher, "SLOW_SECONDS", 0.1)
    monkeypatch.setattr(launcher, "check_launch", lambda config: time.sleep(0.5) or "done before")
    monkeypatch.setattr(launcher, "read_summary", lambda directory: {})
    config = load_config(None, overrides=[f"run.dir={tmp_path / 'run'}"], environment={})
    assert train(config, Terminal(as_json=False), StopRequests()) == ExitCode.DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "done before"
    assert lines[0].startswith("still checking, for 0 s: the data (digits) is listed")
