"""What docs/several-machines.md shows is valid, and agrees with the Slurm script."""

import re
import shlex
from pathlib import Path

import typer
from torch.distributed.run import get_args_parser  # noqa: TID251  # torchrun's own parser

from kfdist.cli.main import app
from kfdist.config import load_config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "several-machines.md").read_text(encoding="utf-8")
SCRIPT = (ROOT / "deploy" / "slurm" / "kfdist.sbatch").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    return [text for marked, text in fences if marked == language]


def commands() -> list[list[str]]:
    """Returns the command lines of the page, each in words."""
    lines = "".join(blocks("")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def check(arguments: list[str]) -> None:
    """Has kfdist's own parser read the arguments of a command."""
    typer.main.get_command(app).commands[arguments[0]].make_context(arguments[0], arguments[1:])  # type: ignore[attr-defined]


def test_the_configuration_is_valid(tmp_path: Path):
    (tmp_path / "run.toml").write_text("\n".join(blocks("toml")))
    config = load_config(tmp_path / "run.toml", environment={})
    (status,) = [words for words in commands() if words[:2] == ["kfdist", "status"]]
    assert (status[2], status[4]) == (config.run.name, config.control.address)


def test_the_commands_are_kfdists_torchruns_and_slurms():
    by_program = {
        program: [words[1:] for words in commands() if words[0] == program] for program in ("kfdist", "torchrun")
    }
    assert [words[0] for words in by_program["kfdist"]] == ["serve", "pool", "status", "pool"]
    (started,) = by_program["torchrun"]
    torchrun = get_args_parser().parse_args(started)
    assert (torchrun.module, torchrun.training_script) == (True, "kfdist")
    for arguments in (*by_program["kfdist"], torchrun.training_script_args):
        check(arguments)
    (sbatch,) = [words for words in commands() if words[0] == "sbatch"]
    assert (ROOT / sbatch[-2]).exists()


def test_its_numbers_are_the_scripts():
    assert "Five minutes before" in PAGE and "#SBATCH --signal=B:USR1@300" in SCRIPT
    assert "takes three nodes" in PAGE and "#SBATCH --nodes=3" in SCRIPT
    ports = set(re.findall(r":(\d{4,5})\b", PAGE)) - {"6379"}  # Ray's own
    assert ports == {"7070", "9464", "29500"}
    assert all(f":{port}" in SCRIPT for port in ports)
