"""`kfdist worker`: what it refuses before it starts anything, and a run of one rank from the command line."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kfdist.config import load_config
from kfdist.errors import CheckpointError, ConfigError, EnvironmentFault
from kfdist.runtime.preconditioner import Preconditioner
from kfdist.system.run_notices import notices, place_of
from kfdist.training import worker
from kfdist.training.setup import check_controller, choose_device, gather_materials
from kfdist.training.worker import run_worker
from kfdist.wire.tree import unpack
from tests.support.training import SMALL


def small(directory: Path, *overrides: str):
    file = directory / "small.toml"
    file.write_text(SMALL)
    return load_config(file, overrides=[f"run.dir={directory / 'run'}", *overrides], environment={})


@pytest.mark.parametrize(
    ("override", "path", "words"),
    [
        ("model.name=cnn", "model.name", "'cnn' is not allowed"),
        ("data.name=digit", "data.name", "did you mean 'digits'"),
        ("data.batch_size=201", "data.batch_size", "1 rank would take 201 .* at most 200"),
        ("optimizer.name=sdg", "optimizer.name", "did you mean 'sgd'"),
        ("preconditioner.method=rskfac", "preconditioner.method", "did you mean 'rs-kfac'"),
        ("preconditioner.settings.rnk=3", "preconditioner.settings", "did you mean 'rank'"),
        ("preconditioner.settings.rank=0", "preconditioner.settings.rank", "at least 1"),
        ('preconditioner.skip=["*"]', "preconditioner", "no layer that can be preconditioned"),
        ('preconditioner.skip=["nothing"]', "preconditioner", "nothing"),
    ],
)
def test_bad_input_leaves_no_run_directory(tmp_path: Path, override: str, path: str, words: str):
    with pytest.raises(ConfigError, match=words) as caught:
        run_worker(small(tmp_path, override))
    assert caught.value.path == path
    assert not (tmp_path / "run").exists()


def test_an_unreachable_controller_is_found_before_anything_starts(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        config = small(tmp_path, "cluster.link=service", f"control.address=127.0.0.1:{port}")
        check_controller(config)
    with pytest.raises(EnvironmentFault, match=rf"no controller at 127\.0\.0\.1:{port} .*start `kfdist serve` first"):
        run_worker(config)
    with pytest.raises(ConfigError, match=r"control\.address: .*port 0"):
        run_worker(small(tmp_path, "cluster.link=service", "control.address=127.0.0.1:0"))
    assert not (tmp_path / "run").exists()


def test_a_rank_that_fails_before_its_first_step_lets_go_of_its_preconditioner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    abandoned, abandon = [], Preconditioner.abandon

    def note(preconditioner: Preconditioner) -> None:
        abandoned.append(preconditioner)
        abandon(preconditioner)

    def refuse(*_: object) -> None:
        raise OSError("no more files")

    monkeypatch.setattr(Preconditioner, "abandon", note)
    monkeypatch.setattr(worker, "make_trackers", refuse)
    with pytest.raises(OSError, match="no more files"):
        run_worker(small(tmp_path, "run.steps=2"))
    assert len(abandoned) == 1


def test_the_summary_is_written_before_the_farewell_in_which_a_stopped_rank_may_be_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen, close = [], Preconditioner.close

    def look(preconditioner: Preconditioner) -> None:
        seen.append(json.loads((tmp_path / "run" / "summary.json").read_text())["status"])
        seen.extend(notice for notice in notices() if notice.directory == str(tmp_path / "run"))
        close(preconditioner)

    monkeypatch.setattr(Preconditioner, "close", look)
    run_worker(small(tmp_path, "run.steps=2", "checkpoint.period=0"))
    status, notice = seen
    assert status == "finished"
    assert (notice.run, notice.address, notice.place) == ("digits", "", place_of(tmp_path / "run")), "for kfdist status"
    assert notice not in notices()


def test_a_device_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(EnvironmentFault, match="rank 99 of its machine, which has .* CUDA devices"):
        choose_device(small(tmp_path, "run.device=cuda"))
    assert choose_device(small(tmp_path, "run.device=cpu")).type == "cpu"


def test_materials_are_the_same_on_every_rank(tmp_path: Path):
    import torch

    config = small(tmp_path)
    one, two = (gather_materials(config, 2, torch.device("cpu")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
    assert torch.equal(one.data.train.inputs, two.data.train.inputs)


@pytest.mark.slow
def test_one_rank_from_the_command_line(tmp_path: Path):
    file = tmp_path / "small.toml"
    file.write_text(SMALL)
    command = [sys.executable, "-m", "kfdist", "worker", str(file), "--set", f"run.dir={tmp_path / 'run'}"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    first = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert (first.returncode, first.stderr) == (0, "")
    assert "training on 1 rank (cpu): mlp on synthetic, sgd with rs-kfac, 40 steps of 1 x 8 examples" in first.stdout
    assert "step 40/40" in first.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["world_size"], summary["rank_modules_clean"]) == ("finished", 1, True)
    again = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert (again.returncode, again.stderr) == (0, "")
    assert "is finished: 40 steps are done and run.steps is 40; raise run.steps" in again.stdout
    changed = subprocess.run([*command, "--set", "optimizer.lr=0.5"], capture_output=True, text=True, env=environment)
    assert changed.returncode == 2
    assert "+ optimizer.lr = 0.5" in changed.stderr


@pytest.mark.parametrize(
    ("dense", "override", "told"),
    [
        ("ekfac-adam", "preconditioner.damping=0.1", "preconditioner.damping does nothing here: ekfac-adam, the run's"),
        ("ekfac-adam", "preconditioner.damping_decay=0.9", "preconditioner.damping_decay does nothing here"),
        ("kfac-eigen", "preconditioner.damping=0.1", ""),
        ("ekfac-adam", "run.log_period=2", ""),
    ],
)
def test_a_damping_that_no_method_of_the_run_has_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dense: str, override: str, told: str
):
    method = ("preconditioner.method=by-width", f"preconditioner.settings={{dense={dense!r}}}")
    run_worker(small(tmp_path, "optimizer.name=kfdist", *method, "run.steps=2", "checkpoint.period=0", override))
    said = capsys.readouterr().out
    assert told in said and ("does nothing" in said) == bool(told)


def optimizer_state(directory: Path) -> dict[str, Any]:
    newest = max((directory / "run" / "checkpoints").iterdir())
    return unpack((newest / "shared.safetensors").read_bytes())["optimizer"]


def test_a_run_that_is_taken_over_has_the_optimizers_settings_of_now(tmp_path: Path):
    run_worker(small(tmp_path, "run.steps=2", "optimizer.weight_decay=0.125"))
    changed = ("optimizer.weight_decay=0.5", "optimizer.momentum=0.25", "run.accept_changes=true")
    assert run_worker(small(tmp_path, "run.steps=4", *changed)).code == 0
    (group,) = optimizer_state(tmp_path)["param_groups"]
    assert (group["weight_decay"], group["momentum"]) == (0.5, 0.25)


def test_a_run_goes_on_in_another_precision(tmp_path: Path):
    for steps, precision in ((2, "float32"), (4, "float16"), (6, "bfloat16")):
        given = (f"run.steps={steps}", f"run.precision={precision}", "run.accept_changes=true")
        assert run_worker(small(tmp_path, *given)).code == 0


def test_a_take_over_that_the_checkpoint_does_not_allow_leaves_the_run_as_it_was(tmp_path: Path):
    run_worker(small(tmp_path, "run.steps=2"))
    changed = ("optimizer.name=adamw", "run.steps=4")
    with pytest.raises(CheckpointError, match=r"kept momentum_buffer .* adamw .* needs exp_avg"):
        run_worker(small(tmp_path, *changed, "run.accept_changes=true"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"
    assert run_worker(small(tmp_path, "run.steps=4")).code == 0
