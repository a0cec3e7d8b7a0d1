import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kfdist.cli.main import app
from kfdist.errors import ConfigError
from kfdist.system.run_notices import RunNotice, place_of, posted


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[Path]]:
    """What is asked for, in place of pages."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KFDIST_RUNTIME_DIR", str(tmp_path / "notices"))
    made: list[list[Path]] = []

    def write(directories: list[Path], output: Path | None) -> Path:
        made.append(directories)
        return output or Path("page.html")

    monkeypatch.setattr("kfdist.report.page.write_report", lambda directory, output: write([directory], output))
    monkeypatch.setattr("kfdist.report.comparison.write_comparison", write)
    return made


def test_runs_are_named_as_elsewhere(asked: list[list[Path]], tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    going = tmp_path / "far" / "away"
    going.mkdir(parents=True)
    notice = RunNotice(pid=os.getpid(), run="going", directory=str(going), place=place_of(going))
    with posted(notice):
        for run in ("runs/digits", ".", "here", "digits", "going"):
            result = CliRunner().invoke(app, ["report", run])
            assert (result.exit_code, result.output) == (0, "report: page.html\n")
    expected = [Path("runs/digits"), Path("."), Path("here"), Path("runs/digits"), going]
    assert [directories for [directories] in asked] == expected


def test_a_name_that_no_run_has_is_told_with_those_that_runs_have(asked: list[list[Path]], tmp_path: Path) -> None:
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    (tmp_path / "runs" / "digits" / "config.toml").touch()
    with pytest.raises(ConfigError, match=r"no run 'digist' here; did you mean 'digits'\?; known here: digits"):
        CliRunner().invoke(app, ["report", "digist"], catch_exceptions=False)
    assert not asked


def test_several_are_compared(asked: list[list[Path]]) -> None:
    result = CliRunner().invoke(app, ["report", "a/b", "c/d", "--output", "x.html", "--json"])
    assert result.output == '{"report": "x.html"}\n'
    assert asked == [[Path("a/b"), Path("c/d")]]
