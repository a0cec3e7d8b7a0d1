"""The Slurm script, run with commands that only note how they were called; its calls are read by the real parsers."""

import json
import os
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from torch.distributed.run import get_args_parser  # noqa: TID251  # torchrun's own parser

from kfdist.cli.main import app
from kfdist.config import Config, load_config
from kfdist.system.addresses import split_address
from tests.support.waits import eventually

SCRIPT = Path(__file__).parents[2] / "deploy" / "slurm" / "kfdist.sbatch"
NODES = ("node1", "node2", "node3")
CONFIG = "[run]\nsteps = 5\n"

NOTE = """#!/usr/bin/env python3
import json, os, pathlib, signal, sys, time
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
environment = {key: value for key, value in os.environ.items() if key.startswith("KFDIST_")}
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps([name, arguments, environment]), file=calls)
if name == "scontrol":
    print("\\n".join(os.environ["NODES"].split()))
if name == "srun":
    while not pathlib.Path(os.environ["STOPPED"]).exists() and "LASTS" in os.environ:
        time.sleep(0.01)
    sys.exit(int(os.environ.get("CODE", "0")))
if name == "kfdist" and arguments[0] == "stop":
    pathlib.Path(os.environ["STOPPED"]).touch()
if name == "kfdist" and "--ready-file" in arguments:
    if arguments[0] in os.environ.get("FAILS", "").split():
        sys.exit(2)
    pathlib.Path(arguments[arguments.index("--ready-file") + 1]).touch()
    died = pathlib.Path(os.environ["STOPPED"]).with_name(arguments[0])
    if arguments[0] in os.environ.get("DIES", "").split() and not died.exists():
        died.touch()
        sys.exit(1)
    signal.pause()
"""


@dataclass(frozen=True)
class Call:
    """How the script called a command, and with what for kfdist in the environment."""

    arguments: list[str]
    environment: dict[str, str]


class Job:
    """The script as a job on three nodes."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir()
        for name in ("scontrol", "srun", "kfdist"):
            (programs / name).write_text(NOTE)
            (programs / name).chmod(0o755)
        (folder / "run.toml").write_text(CONFIG)
        environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "CALLS": str(folder / "calls"),
            "STOPPED": str(folder / "stopped"),
            "NODES": " ".join(NODES),
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NAME": "kfdist",
            "SLURM_JOB_NODELIST": "node[1-3]",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_TMPDIR": str(folder),
            "KFDIST_SECURITY__CERTIFICATES": str(folder / "certs"),
            **variables,
        }
        self.process = subprocess.Popen(
            ["bash", str(SCRIPT), str(folder / "run.toml")], env=environment, stderr=subprocess.PIPE, text=True
        )

    def end(self) -> tuple[int, str]:
        said = self.process.communicate(timeout=30)[1]
        return self.process.returncode, said

    def calls(self, name: str) -> list[Call]:
        file = self.folder / "calls"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [Call(arguments, environment) for called, arguments, environment in lines if called == name]


def config_of(call: Call, arguments: list[str]) -> Config:
    """Returns what a command of kfdist makes of its arguments, by its own parser."""
    command = typer.main.get_command(app)
    name, *rest = arguments
    parsed = command.commands[name].make_context(name, rest).params  # type: ignore[attr-defined]
    given = [*(parsed["overrides"] or ())]
    if (controller := parsed.get("controller")) is not None:
        given.append(f'control.address="{controller}"')
    return load_config(parsed["config"], overrides=given, environment=call.environment)


def test_its_commands_are_kfdists_and_agree_on_names_and_ports(tmp_path: Path):
    job = Job(tmp_path)
    assert job.end() == (0, "")
    serve, pool = job.calls("kfdist")
    (srun,) = job.calls("srun")
    at = srun.arguments.index("torchrun")
    torchrun = get_args_parser().parse_args(srun.arguments[at + 1 :])
    assert (torchrun.module, torchrun.training_script) == (True, "kfdist")
    assert (torchrun.nnodes, torchrun.nproc_per_node, torchrun.max_restarts) == ("2", "8", 3)
    assert split_address(torchrun.rdzv_endpoint) == ("node2", 29500)
    assert {"--nodelist=node2,node3", "--nodes=2", "--ntasks=2"} <= set(srun.arguments[:at])
    serving, owning = config_of(serve, serve.arguments), config_of(pool, pool.arguments)
    training = config_of(srun, torchrun.training_script_args)
    assert owning.control.address == training.control.address == "node1:7070"
    assert serving.control.address == "0.0.0.0:7070"
    assert serving.control.metrics_address.endswith(Config().control.metrics_address.partition(":")[2])
    assert owning.cluster.owner_address == "node"
    for config in (serving, owning, training):
        assert (config.run.name, config.run.steps) == ("kfdist", 5)
        assert config.security.certificates == str(tmp_path / "certs")
    assert not list(tmp_path.glob("kfdist-77-*")), "what was on the node's disk is removed"


def test_before_the_time_is_over_it_stops_the_run_and_keeps_its_end(tmp_path: Path):
    job = Job(tmp_path, LASTS="1", CODE="3")
    while not job.calls("srun"):
        assert job.process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)  # bash sets its trap after srun has begun; until then the signal would end it
    job.process.send_signal(signal.SIGUSR1)
    assert job.end()[0] == 3
    stop = job.calls("kfdist")[-1].arguments
    parsed = typer.main.get_command(app).commands["stop"].make_context("stop", stop[1:]).params  # type: ignore[attr-defined]
    assert (parsed["run"], parsed["address"]) == ("kfdist", "node1:7070")


def test_a_service_that_ends_is_started_again(tmp_path: Path):
    """Without owners, ranks with a fixed lag would wait for the rest of the job's time."""
    job = Job(tmp_path, LASTS="1", DIES="serve pool", RESTART_SECONDS="0.1")
    twice = [("pool", 2), ("serve", 2)]
    try:
        eventually(lambda: sorted(Counter(each.arguments[0] for each in job.calls("kfdist")).items()), twice.__eq__)
        assert len({tuple(each.arguments) for each in job.calls("kfdist")}) == 2, "as they were started before"
        assert job.process.poll() is None
    finally:
        (tmp_path / "stopped").touch()
        code, said = job.end()
    assert code == 0
    again = [f"kfdist {name} ended with 1; it is started again in 0.1 s" for name in ("pool", "serve")]
    assert sorted(said.splitlines()) == again
    assert not list(tmp_path.glob("kfdist-77-*"))


@pytest.mark.parametrize("fails", ["serve", "pool"])
def test_a_service_that_never_served_ends_the_job(tmp_path: Path, fails: str):
    job = Job(tmp_path, FAILS=fails)
    assert job.end()[0] == 1
    assert [each.arguments[0] for each in job.calls("kfdist")] == ["serve", "pool"][: 1 + (fails == "pool")]
    assert job.calls("srun") == []


@pytest.mark.parametrize(
    ("variables", "code", "reason"),
    [
        ({"NODES": "node1"}, 2, "needs 2 nodes or more"),
        ({"KFDIST_SECURITY__CERTIFICATES": ""}, 1, "kfdist certs init"),
    ],
)
def test_what_it_lacks_is_said_before_anything_starts(
    tmp_path: Path, variables: dict[str, str], code: int, reason: str
):
    job = Job(tmp_path, **variables)
    ended, said = job.end()
    assert ended == code and reason in said
    assert job.calls("kfdist") == []
