"""What a job checks before it starts anything, and what it leaves on its node."""

import datetime
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from kfdist.config import load_config, to_toml
from kfdist.errors import ConfigError, EnvironmentFault, ExitCode
from kfdist.launch import launcher
from kfdist.launch.submission import ray_launch
from kfdist.launch.submission.ray_launch import RayLaunch, run_job
from kfdist.launch.submission.request import Submission
from kfdist.launch.terminal import StopRequests, Terminal
from kfdist.rpc.certificates import Authority
from kfdist.system.credentials import Role


def test_data_that_the_jobs_node_lacks_hides_no_certificate_that_is_wrong(
    certificates: Path, tmp_path: Path, monkeypatch
):
    def lacks_data(*_: object) -> None:
        raise ConfigError("is '/data', no directory", path="data.settings.root")

    directory = shutil.copytree(certificates, tmp_path / "certificates")
    expired = Authority.read(directory).issue(Role.OWNER, valid=datetime.timedelta(days=-1))
    (directory / Role.OWNER.file_name).write_bytes(expired)
    overrides = [f"run.dir={tmp_path / 'run'}", f"security.certificates={directory}"]
    overrides += ["control.address=127.0.0.1:0", "control.metrics_address=127.0.0.1:0"]
    config = load_config(None, overrides=overrides, environment={})
    submission = Submission(config=to_toml(config), gpus_per_worker=0, max_failures=0, storage=str(tmp_path))
    for name, value in {**submission.variables(), "RAY_ADDRESS": "127.0.0.2:6379"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("KFDIST_SECURITY__CERTIFICATES", raising=False)
    monkeypatch.setattr(ray_launch, "check_ray_train", lambda: None)
    monkeypatch.setattr(launcher, "gather_materials", lacks_data)
    monkeypatch.setattr(RayLaunch, "run", lambda self: pytest.fail("the launch was started"))
    with pytest.raises(EnvironmentFault, match=r"owner\.pem expired on"):
        run_job(Terminal(as_json=False), StopRequests())


def test_a_job_can_be_stopped_in_its_checks(tmp_path: Path, monkeypatch, capsys):
    requests = StopRequests()
    overrides = [f"run.dir={tmp_path / 'run'}", "control.address=127.0.0.1:0", "control.metrics_address=127.0.0.1:0"]
    config = load_config(None, overrides=overrides, environment={})
    submission = Submission(config=to_toml(config), gpus_per_worker=0, max_failures=0, storage=str(tmp_path))
    for name, value in {**submission.variables(), "RAY_ADDRESS": "127.0.0.2:6379"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ray_launch, "check_ray_train", lambda: None)
    monkeypatch.setattr(launcher, "gather_materials", lambda *_: requests.ask(signal.SIGTERM, None))
    monkeypatch.setattr(RayLaunch, "run", lambda self: pytest.fail("the launch was started"))
    assert run_job(Terminal(as_json=False), requests) == ExitCode.RESUMABLE
    assert "stopped before anything was started" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "kept"), [(ExitCode.DONE, True), (ExitCode.ENVIRONMENT, True), (ExitCode.BAD_INPUT, False), (None, False)]
)
def test_what_ranks_trained_on_other_nodes_keeps_its_files_here(
    tmp_path: Path, monkeypatch, code: int | None, kept: bool
):
    run = tmp_path / "run"
    launch = RayLaunch(
        load_config(None, overrides=[f"run.dir={run}"], environment={}), Terminal(as_json=False), StopRequests()
    )

    def ranks_end() -> int:
        if code is not None:
            launch._ranks = [SimpleNamespace(poll=lambda: code)]  # type: ignore[list-item]
        if code != ExitCode.DONE:
            raise EnvironmentFault("the ranks' driver failed")
        (run / "summary.json").write_text(json.dumps({"status": "finished", "steps": 60, "seconds": 2.0}))
        return ExitCode.DONE

    monkeypatch.setattr(launcher, "become_subreaper", lambda: None)
    monkeypatch.setattr(launch, "_run_until_end", ranks_end)
    monkeypatch.setattr(launch, "_end", lambda: None)
    if code == ExitCode.DONE:
        assert launch.run() == ExitCode.DONE
        assert json.loads((run / "summary.json").read_text())["steps"] == 60
    else:
        with pytest.raises(EnvironmentFault, match="driver failed"):
            launch.run()
    assert (run / "logs").exists() == kept
