"""Bad input and unfit machines: the exit code, the words, and nothing half-made."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kfdist.models import MODELS
from tests.support.commands import run
from tests.support.launches import ENDLESS, LOCAL, ONE_RANK, Train, launch

pytestmark = pytest.mark.timeout(300)


def method(name: str, *more: str) -> list[str]:
    """The arguments that choose a method, and more values of that section."""
    return [part for value in (f"method={name}", *more) for part in ("--set", f"preconditioner.{value}")]


# One mistake a row: the arguments, and words that the message must have (the value, what is allowed, what to do).
MISTAKES = [
    (["--set", "run.stepz=3"], ["run.stepz", "did you mean 'steps'"]),
    (["--set", "run.steps=many"], ["run.steps", "'many'", "integer"]),
    (["--set", "run.steps=10", "--set", "run.epochs=1"], ["run.steps", "both"]),
    (["--set", "preconditioner.damping=0"], ["preconditioner.damping", "is 0", "greater than 0"]),
    (["--set", "preconditioner.damping=nan"], ["preconditioner.damping", "nan", "finite"]),
    (["--set", "preconditioner.inverse_period=15"], ["inverse_period", "is 15", "multiple", "take 10 or 20"]),
    (["--set", "preconditioner.adoption=fixed-lag"], ["preconditioner.lag", "missing"]),
    (["--set", "preconditioner.staleness.hard_bound=2"], ["hard_bound", "is 2", "smallest legal value"]),
    (["--set", "preconditioner.method=rs-kfak"], ["preconditioner", "'rs-kfak'", "did you mean 'rs-kfac'"]),
    (["--set", "preconditioner.settings.dens=kfac"], ["preconditioner", "'dens'", "did you mean 'dense'"]),
    (method("eva", "settings.rank=3"), ["preconditioner.settings: eva has no setting 'rank'", "it has none"]),
    (method("ekfac", "settings.examples=0"), ["preconditioner.settings.examples: 0", "at least 1"]),
    (method("cg-fac", "settings.tolerance=many"), ["settings.tolerance: 'many'", "above 0 and below 1"]),
    (
        method("b-kfac-c", "settings.correction_fraction=2"),
        ["settings.correction_fraction: 2", "at least 0 and at most 1"],
    ),
    (method("b-kfac", "settings.brand_period=3"), ["settings.brand_period: 3", "multiple of the factor period (10)"]),
    (method("seng", "settings.form=dense"), ["settings.form: 'dense'", "explicit"]),
    (method("seng", "fisher=exact"), ["preconditioner.fisher: seng", "fisher='mc' or 'empirical'"]),
    (method("two-level", "settings.inner=eva"), ["settings.inner: 'eva'", "kfac-eigen"]),
    (method("two-level", "settings.inner_settings.rank=3"), ["settings.inner_settings", "kfac-eigen has no", "'rank'"]),
    (method("kfac-tridiagonal"), ["preconditioner.method: kfac-tridiagonal", "Linear layers only", "give it `kfac`"]),
    (method("auto", "settings.allow=[]"), ["preconditioner.settings.allow: ", "name some of"]),
    (
        ["--set", 'preconditioner.methods={"0" = "kfac", "*" = {method = "b-kfac", brand_period = 3}}'],
        ['preconditioner.methods."*".brand_period: 3', "multiple of the factor period (10)"],
    ),
    (
        [*method("ekfac-adam"), "--set", "optimizer.name=sgd"],
        ["optimizer.name", "is 'sgd'", "'ekfac-adam'", "Adam's size", "set it to 'kfdist'"],
    ),
    (
        ["--set", "optimizer.settings.graft=sgd", *method("ekfac-adam")],
        ["optimizer.settings.graft: is 'sgd'", "ekfac-adam", "learning rate"],
    ),
    (["--set", "optimizer.name=kfdist", "--set", "optimizer.settings=3"], ["optimizer.settings", "3"]),
    (["--set", 'preconditioner.skip=["*"]'], ["no layer that can be preconditioned", "skip"]),
    (["--set", 'preconditioner.skip=["nosuch*"]'], ["'nosuch*'", "matches no layer"]),
    (["--set", "cluster.owners=0"], ["cluster.owners", "at least 1", "local"]),
    (["--set", "cluster.workers=0"], ["cluster.workers", "at least 1"]),
    (["--set", "control.address=0.0.0.0:7070"], ["control.address", "loopback"]),
    (["--set", "control.address=somewhere"], ["control.address", "host:port"]),
    (["--set", "model.name=resnet-9000"], ["model.name", "'resnet-9000'", "digits-cnn"]),
    (["--set", "data.name=imagenot"], ["data.name", "'imagenot'", "digits"]),
    (["--set", "data.batch_size=100000"], ["data.batch_size", "100000", "at most 719"]),
    (["--set", "optimizer.name=sdg"], ["optimizer.name", "'sdg'", "did you mean 'sgd'"]),
    (["--set", "nonsense"], ["--set", "section.key=value"]),
    (["nosuch.toml"], ["nosuch.toml", "no such file"]),
    (["--nosuch-option"], ["no such option"]),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_a_mistake_exits_with_2_names_value_and_remedy_and_makes_nothing(
    tmp_path: Path, train: Train, arguments: list[str], words: list[str]
):
    code, output = train(*arguments, "--set", f"run.dir={tmp_path / 'runs' / 'it'}")
    assert code == 2, output
    for word in words:
        assert word in output
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_is_a_sentence_on_standard_error_without_a_stack_trace(tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "kfdist",
        "train",
        "--set",
        "model.name=it",
        "--set",
        f"run.dir={tmp_path / 'run'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    names = ", ".join(map(repr, MODELS))
    own = 'or "package.module:function", your own'
    assert done.stderr == f"kfdist: model.name: 'it' is not allowed; choose one of {names} ({own})\n"
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, train: Train):
    (tmp_path / "it.toml").write_text("[run\nsteps = 3")
    code, output = train(str(tmp_path / "it.toml"))
    assert code == 2, output
    assert "isn't valid TOML" in output and "line 1" in output


def test_a_mistake_is_told_as_json_where_json_is_asked_for(tmp_path: Path, train: Train):
    code, output = train("--json", "--set", "run.steps=0", "--set", f"run.dir={tmp_path / 'run'}")
    assert code == 2, output
    error = json.loads(output.splitlines()[0])["error"]
    assert error["kind"] == "bad_input" and error["path"] == "run.steps" and "at least 1" in error["message"]


def test_a_stack_trace_is_shown_only_where_it_is_asked_for():
    output = run("train", "--set", "run.steps=0", environment={"KFDIST_DEBUG": "1"}, code=1)
    assert "Traceback" in output and "run.steps" in output


@pytest.mark.parametrize("field", ["control.address", "control.metrics_address"])
def test_a_port_in_use_exits_with_1(tmp_path: Path, train: Train, field: str):
    directory = tmp_path / "run"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, output = train("--set", f"{field}={address}", "--set", f"run.dir={directory}")
    assert code == 1, output
    assert field in output and address in output and "choose another" in output
    assert not directory.exists()


def test_a_run_directory_that_is_a_file_exits_with_2(tmp_path: Path, train: Train):
    (tmp_path / "run").write_text("precious")
    code, output = train("--set", f"run.dir={tmp_path / 'run'}")
    assert code == 2, output
    assert "run.dir" in output and "file" in output
    assert (tmp_path / "run").read_text() == "precious"


def test_a_run_directory_that_cannot_be_made_exits_with_1(train: Train):
    code, output = train("--set", "run.dir=/proc/kfdist-run", "--set", "cluster.link=local")
    assert code == 1, output
    assert "/proc/kfdist-run" in output and "run.dir" in output


def test_a_worker_without_a_controller_exits_with_1(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    output = run("worker", "--set", f"control.address={address}", "--set", f"run.dir={tmp_path / 'run'}", code=1)
    assert address in output and "kfdist serve" in output
    assert not (tmp_path / "run").exists()


def test_a_ray_that_cannot_be_reached_exits_with_1_and_leaves_nothing(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    directory = tmp_path / "runs" / "it"
    with launch(directory, *ONE_RANK, "--set", f"cluster.ray={address}") as command:
        command.expect(1)
        assert address in command.text
        assert command.left_behind(5) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_that_trains_already_is_not_started_twice(tmp_path: Path):
    with launch(tmp_path / "run", *LOCAL, *ONE_RANK, *ENDLESS) as first:
        first.wait_for_line("step ")
        with launch(tmp_path / "run", *LOCAL, *ONE_RANK, *ENDLESS) as second:
            output = second.expect(1)
        assert "in use" in output and "another run.dir" in output
        assert first.process.poll() is None
