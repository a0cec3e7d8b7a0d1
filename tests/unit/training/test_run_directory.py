"""One trainer at a time, no drift, and nothing half made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kfdist.config import Config, load_config
from kfdist.curvature.auto import MeasuredCosts, Rate
from kfdist.curvature.inverter import Operation
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.training.run_directory import RunDirectory, inspect_run, read_costs
from kfdist.training.summary import write_summary


def config_in(directory: Path, *overrides: str) -> Config:
    return load_config(None, overrides=[f"run.dir={directory}", *overrides], environment={})


def started(config: Config, costs: MeasuredCosts | None = None) -> RunDirectory:
    opened = RunDirectory.open(config)
    opened.begin(opened.last_epoch + 1, config, costs)
    opened.take_over(config)
    return opened


def test_a_new_directory_has_its_configuration_and_each_start_a_higher_epoch(tmp_path: Path):
    run = tmp_path / "deep" / "run"
    config = config_in(run, "run.steps=7")
    assert inspect_run(config) == ""
    assert not run.exists()
    for epoch in (1, 2, 3):
        opened = RunDirectory.open(config)
        assert opened.last_epoch == epoch - 1
        opened.begin(epoch, config)
        opened.close()
        assert inspect_run(config) == ""
    assert load_config(run / "config.toml", environment={}) == config
    assert sorted(path.name for path in (run / "epochs").iterdir()) == ["00001.toml", "00002.toml", "00003.toml"]


def test_a_mark_that_an_editor_put_before_the_saved_configuration_changes_nothing(tmp_path: Path):
    config = config_in(tmp_path / "run")
    started(config).close()
    saved = tmp_path / "run" / "config.toml"
    saved.write_bytes(b"\xef\xbb\xbf" + saved.read_bytes())
    assert inspect_run(config) == ""


def test_a_run_that_an_older_version_started_goes_on_with_the_defaults_of_keys_that_are_new(tmp_path: Path):
    started(config_in(tmp_path)).close()
    saved = tmp_path / "config.toml"
    new = ("damping_decay", "damping_epochs", "inverse_period_epochs", "kl_clip_decay", "kl_clip_epochs")
    kept = [line for line in saved.read_text(encoding="utf-8").splitlines() if not line.startswith(new)]
    saved.write_text("\n".join(kept), encoding="utf-8")
    assert inspect_run(config_in(tmp_path)) == ""
    with pytest.raises(ConfigError, match=r"- preconditioner\.damping_decay = 1\.0\n.*\+ .*damping_decay = 0\.5"):
        inspect_run(config_in(tmp_path, "preconditioner.damping_decay=0.5"))


def test_settings_that_a_run_was_started_without_are_a_change(tmp_path: Path):
    started(config_in(tmp_path, "optimizer.name=sgd", "preconditioner.method=rs-kfac")).close()
    with pytest.raises(ConfigError, match=r"\+ preconditioner\.settings\.rank = 128"):
        inspect_run(config_in(tmp_path, "optimizer.name=sgd"))


def test_a_path_that_the_system_refuses_is_told(tmp_path: Path):
    with pytest.raises(EnvironmentFault, match=r"can't read the run directory .*File name too long"):
        inspect_run(config_in(Path("/".join([str(tmp_path), *["deep" * 50] * 30]))))


def test_a_start_that_was_taken_over_notices(tmp_path: Path):
    # As where flock doesn't reach: a node that nobody sees any more still trains.
    config = config_in(tmp_path / "run")
    first = started(config)
    first.check_current()
    (tmp_path / "run" / "lock").unlink()
    second = started(config)
    with pytest.raises(EnvironmentFault, match="start 2 of the run has taken over .*; this one, 1, may not write"):
        first.check_current()
    second.check_current()


HOLDER = """
import sys
from pathlib import Path
from kfdist.config import load_config
from kfdist.training.run_directory import RunDirectory
config = load_config(None, overrides=["run.dir=" + sys.argv[1]], environment={})
opened = RunDirectory.open(config)
opened.begin(opened.last_epoch + 1, config)
print(opened.last_epoch + 1, flush=True)
sys.stdin.read()
"""


def hold(directory: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    return process


def test_a_second_trainer_is_told_who_has_the_directory_until_that_one_is_gone(tmp_path: Path):
    config = config_in(tmp_path / "run")
    holder = hold(tmp_path / "run")
    try:
        for attempt in (inspect_run, RunDirectory.open):
            with pytest.raises(
                EnvironmentFault, match=rf"in use by process {holder.pid} on .*; stop that one, or choose"
            ):
                attempt(config)
    finally:
        holder.kill()  # no chance to clean up: the lock ends with the process all the same
        holder.communicate()
    opened = RunDirectory.open(config)
    assert opened.last_epoch == 1
    opened.close()


@pytest.mark.parametrize(
    "change",
    [
        "run.steps=9",
        "run.epochs=9",
        "run.log_period=1",
        "run.eval_period=3",
        "cluster.workers=4",
        "cluster.owners=3",
        "control.address=127.0.0.1:0",
        "checkpoint.keep=9",
        "preconditioner.wait_limit_seconds=5",
    ],
)
def test_what_does_not_change_the_mathematics_may_change(tmp_path: Path, change: str):
    started(config_in(tmp_path)).close()
    assert inspect_run(config_in(tmp_path, change)) == ""


def test_what_changes_the_mathematics_is_refused_with_a_diff_unless_it_is_accepted(tmp_path: Path):
    started(config_in(tmp_path, "preconditioner.method=rs-kfac", "preconditioner.settings.rank=30")).close()
    changed = ["optimizer.lr=0.125", "preconditioner.method=kfac", "run.steps=999"]
    for attempt in (inspect_run, RunDirectory.open):
        with pytest.raises(ConfigError) as caught:
            attempt(config_in(tmp_path, *changed))
    message = str(caught.value)
    assert caught.value.path == "run.dir"
    old_lr = Config().optimizer.lr
    for line in (f"- optimizer.lr = {old_lr}", "+ optimizer.lr = 0.125", "- preconditioner.method = 'rs-kfac'"):
        assert f"  {line}\n" in message
    assert "  - preconditioner.settings.rank = 30\n" in message
    assert "run.steps" not in message
    assert "--set run.accept_changes=true" in message
    accepted = config_in(tmp_path, *changed, "run.accept_changes=true")
    started(accepted).close()
    # Accepted once; from now on the new configuration is the run's, and the permission is used up.
    assert inspect_run(config_in(tmp_path, *changed)) == ""
    assert not load_config(tmp_path / "config.toml", environment={}).run.accept_changes


def test_a_start_that_fails_before_it_has_taken_the_run_over_leaves_its_configuration(tmp_path: Path):
    started(config_in(tmp_path)).close()
    failing = config_in(tmp_path, "optimizer.lr=0.125", "run.accept_changes=true")
    opened = RunDirectory.open(failing)
    opened.begin(opened.last_epoch + 1, failing)
    opened.abandon()
    assert inspect_run(config_in(tmp_path)) == ""
    assert "lr = 0.125" in (tmp_path / "epochs" / "00002.toml").read_text(encoding="utf-8")


def test_a_finished_run_says_so_and_how_to_go_on(tmp_path: Path):
    config = config_in(tmp_path, "run.steps=20")
    started(config).close()
    assert inspect_run(config) == ""
    write_summary(tmp_path, {"status": "finished", "steps": 20, "data_epochs": 2})
    assert "20 steps are done and run.steps is 20; raise run.steps" in inspect_run(config)
    assert inspect_run(config_in(tmp_path, "run.steps=21")) == ""
    assert "raise run.epochs" in inspect_run(config_in(tmp_path, "run.epochs=2"))
    assert inspect_run(config_in(tmp_path, "run.epochs=3")) == ""
    write_summary(tmp_path, {"status": "stopped", "steps": 20, "data_epochs": 2})
    assert inspect_run(config) == ""
    write_summary(tmp_path, {"status": "finished", "steps": 20, "data_epochs": 2, "unsaved_steps": 10})
    assert inspect_run(config) == ""


def test_a_run_directory_under_a_file_is_no_matter_of_costs(tmp_path: Path):
    (tmp_path / "file").touch()
    assert read_costs(tmp_path / "file" / "run") is None


def test_the_costs_of_the_first_start_are_kept(tmp_path: Path):
    """A resumed run with "auto" must choose as it did, however busy its machine is now."""
    config = config_in(tmp_path / "run")
    assert read_costs(tmp_path / "run") is None
    for rate in (Rate(1e-5, 1e-10), Rate(2e-5, 2e-10)):
        started(config, MeasuredCosts(rates={Operation.EIGH: rate})).close()
        assert read_costs(tmp_path / "run") == MeasuredCosts(rates={Operation.EIGH: Rate(1e-5, 1e-10)})


@pytest.mark.parametrize("content", ["", "[]", '{"eigh": 3}', '{"unknown": [1, 2]}', '{"eigh": [1, 2, 3]}'])
def test_costs_that_cannot_be_read_are_told_with_the_remedy(tmp_path: Path, content: str):
    (tmp_path / "costs.json").write_text(content)
    with pytest.raises(EnvironmentFault, match=r"can't read .*costs\.json.*remove it to measure anew"):
        read_costs(tmp_path)


def test_a_start_that_fails_leaves_no_costs(tmp_path: Path):
    started(config_in(tmp_path / "run"), MeasuredCosts(rates={})).abandon()
    assert not (tmp_path / "run").exists()


def test_a_start_that_fails_leaves_nothing_of_a_new_directory(tmp_path: Path):
    run = tmp_path / "run"
    started(config_in(run)).abandon()
    assert not run.exists()


def test_a_start_that_fails_keeps_what_was_there_before(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    started(config_in(tmp_path)).abandon()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    started(config_in(tmp_path)).close()
    started(config_in(tmp_path)).abandon()
    assert (tmp_path / "config.toml").exists()


def test_a_file_is_no_run_directory(tmp_path: Path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match=r"run\.dir: is '.*', which is a file"):
        inspect_run(config_in(tmp_path / "run"))


def test_a_damaged_configuration_is_refused_and_not_overwritten(tmp_path: Path):
    started(config_in(tmp_path)).close()
    (tmp_path / "config.toml").write_text("[run\n")
    with pytest.raises(ConfigError, match="can't be read"):
        RunDirectory.open(config_in(tmp_path))
    assert (tmp_path / "config.toml").read_text() == "[run\n"


def test_a_directory_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="can't make the run directory .*; choose another run.dir"):
        RunDirectory.open(config_in(tmp_path / "file" / "run"))


def test_the_files_that_a_saved_configuration_names_are_found_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    config = config_in(
        tmp_path / "run", "control.database=served/c.sqlite", "security.certificates=certs", "security.token_file=~/t"
    )
    started(config).close()
    for file in ("config.toml", "epochs/00001.toml"):
        saved = load_config(tmp_path / "run" / file, environment={})
        assert saved.control.database == str(tmp_path / "work" / "served" / "c.sqlite")
        assert saved.security.certificates == str(tmp_path / "work" / "certs")
        assert saved.security.token_file == "~/t"
    assert inspect_run(config) == "", "where files are is no other configuration"


def test_a_working_directory_that_has_no_name_in_utf_8_stays_unnamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    work = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    work.mkdir()
    monkeypatch.chdir(work)
    started(config_in(tmp_path / "run", "control.database=c.sqlite")).close()
    assert load_config(tmp_path / "run" / "config.toml", environment={}).control.database == "c.sqlite"
