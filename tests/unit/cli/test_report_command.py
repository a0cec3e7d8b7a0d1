"""Which run `kfdist report` writes a page about, and where the page goes."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kfdist.cli.main import app
from kfdist.errors import ConfigError
from kfdist.system.run_notices import RunNotice, place_of, posted


@pytest.fixture(autouse=True)
def _in_a_new_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KFDIST_RUNTIME_DIR", str(tmp_path / "notices"))


def begun(directory: Path, name: str) -> Path:
    """Makes the directory of a run that has written its configuration and nothing else."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.toml").write_text(f'[run]\nname = "{name}"\n')
    return directory


def report(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["report", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_runs_are_named_as_elsewhere(tmp_path: Path) -> None:
    begun(tmp_path, "this")
    begun(tmp_path / "here", "here")
    begun(tmp_path / "runs" / "digits", "digits")
    going = begun(tmp_path / "far" / "away", "going")
    notice = RunNotice(pid=os.getpid(), run="going", directory=str(going), place=place_of(going))
    expected = {
        "runs/digits": ("runs/digits/report.html", "digits"),
        ".": ("report.html", "this"),
        "here": ("here/report.html", "here"),
        "digits": ("runs/digits/report.html", "digits"),
        "going": (f"{going}/report.html", "going"),
    }
    with posted(notice):
        for given, (page, name) in expected.items():
            Path(page).unlink(missing_ok=True)
            assert report(given) == f"report: {page}\n"
            assert f"<title>Run {name}</title>" in Path(page).read_text()


def test_a_name_that_no_run_has_is_told_with_those_that_runs_have(tmp_path: Path) -> None:
    begun(tmp_path / "runs" / "digits", "digits")
    with pytest.raises(ConfigError, match=r"no run 'digist' here; did you mean 'digits'\?; known here: digits"):
        report("digist")
    assert not list(tmp_path.rglob("*.html"))


def test_several_are_compared(tmp_path: Path) -> None:
    begun(tmp_path / "a" / "b", "one")
    begun(tmp_path / "c" / "d", "other")
    assert report("a/b", "c/d", "--output", "x.html", "--json") == '{"report": "x.html"}\n'
    assert "<title>Runs one and other</title>" in Path("x.html").read_text()
