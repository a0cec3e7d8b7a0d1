"""The command line itself: help that fits, and wrong uses and warnings that are told like any other bad input."""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

from kfdist.cli import main
from kfdist.errors import ExitCode


def helps(command: Any, path: str, parent: Any = None) -> Iterator[tuple[str, str]]:
    context = command.make_context(path.rpartition(" ")[2], [], parent=parent, resilient_parsing=True)
    yield path, command.get_help(context)
    for name, below in getattr(command, "commands", {}).items():
        if not below.hidden:
            yield from helps(below, f"{path} {name}", context)


HELPS = dict(helps(get_command(main.app), "kfdist"))


@pytest.mark.parametrize("path", HELPS)
def test_help_fits_80_columns_and_cuts_nothing(path: str) -> None:
    lines = HELPS[path].splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if "…" in line or line.startswith("  ") and line.endswith("...")]


def test_every_command_has_help() -> None:
    assert {"kfdist train", "kfdist watch", "kfdist certs init", "kfdist bench papers"} <= HELPS.keys()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("wacth", "no such command 'wacth'. Did you mean 'watch'? `kfdist --help` says"),
        (
            "events --after -3",
            "'--after': '-3' is not allowed; give a whole number of at least 0; `kfdist events --help`",
        ),
        ("events --after 1.5", "'1.5' is not allowed; give a whole number of at least 0"),
        ("events --after 9223372036854775808", "give a whole number from 0 to 9223372036854775807"),
        ("watch --from-revision x", "'--from-revision': 'x' is not allowed"),
        ("stop --timeout nan", "'nan' is not allowed; give a number of at least 0"),
        ("plan --world 0", "'0' is not allowed; give a whole number of at least 1"),
        ("plan --step-seconds 0", "give a number of at least 1e-06"),
        ("certs init there --days 4000", "'4000' is not allowed; give a whole number from 1 to 3650"),
        ("certs init ''", "'DIR': '' is no directory; give its name, or . for the working directory"),
        ("bench inversion --size x", "'x' is not allowed; give a whole number"),
        ("drain", "missing argument 'OWNER'; `kfdist drain --help`"),
        ("set --bogus", "no such option: --bogus; `kfdist set --help`"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_wrong_use_names_the_value_and_what_is_allowed(
    given: str, words: str, as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["kfdist", *shlex.split(given), *(["--json"] if as_json else [])])
    assert main.run() == ExitCode.BAD_INPUT
    told = capsys.readouterr()
    assert words in told.err and told.err.startswith("kfdist: ") and told.err.count("\n") == 1
    if as_json:
        error = json.loads(told.out)["error"]
        assert error["kind"] == "bad_input" and words in error["message"]
    else:
        assert told.out == ""


@pytest.mark.parametrize("given", ["", "bench", "certs"])
def test_no_command_at_all_gets_help(
    given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["kfdist", *given.split()])
    assert main.run() == ExitCode.BAD_INPUT
    assert capsys.readouterr().err.startswith("Usage: kfdist")


def test_a_warning_is_one_line_without_code() -> None:
    script = (
        "import warnings, kfdist; from kfdist.cli import main\n"
        "def run():\n    warnings.warn('block 7: stale', kfdist.KfdistWarning)\n    return 0\n"
        "main.run = run; main.main()"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "kfdist: block 7: stale\n")
