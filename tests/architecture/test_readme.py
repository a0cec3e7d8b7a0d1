"""What the README shows works as shown."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from kfdist.cli.main import app
from kfdist.config import load_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [text for marked, text in fences if marked == language]


def test_the_library_example_runs():
    example = _blocks("python")[0]
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ekfac-adam" in done.stdout


def test_the_library_example_is_short():
    example = _blocks("python")[0]
    assert len([line for line in example.splitlines() if line.strip()]) <= 16


@pytest.mark.parametrize("example", _blocks("python")[1:])
def test_the_other_examples_run(example: str):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(example, "<README.md>", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("example", _blocks("toml"))
def test_configurations_are_valid(example: str, tmp_path: Path):
    (tmp_path / "digits.toml").write_text(example)
    assert load_config(tmp_path / "digits.toml", environment={}).run.steps == 120


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z-]+)", README))))
def test_every_make_target_exists(target: str):
    subprocess.run(["make", "--dry-run", target], check=True, cwd=ROOT, capture_output=True)


def test_every_command_exists():
    commands = "\n".join([*_blocks(""), *re.findall(r"`kfdist [^`]*`", README)])
    shown = set(re.findall(r"(?:^|`|-m )kfdist ([a-z|]+)\b", commands, flags=re.MULTILINE))
    names = {name for words in shown for name in words.split("|")}
    assert {"train", "serve", "pool", "worker", "status"} <= names
    help_text = subprocess.run([sys.executable, "-m", "kfdist", "--help"], capture_output=True, text=True).stdout
    assert {name for name in names if not re.search(rf"^  {name} ", help_text, flags=re.MULTILINE)} == set()


def test_every_file_it_names_exists():
    for name in re.findall(r"`((?:kfdist|tests|docs|benchmarks)/[\w./-]+)`", README):
        if "my_method" not in name:
            assert (ROOT / name).exists(), name


def test_every_command_but_worker_prints_json():
    def leaves(group):
        for name, command in group.commands.items():
            if not command.hidden:
                yield from leaves(command) if hasattr(command, "commands") else [(name, command)]

    without = {name for name, command in leaves(get_command(app)) if "--json" not in _options_of(command)}
    assert without == {"worker"}


def _options_of(command) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts}
