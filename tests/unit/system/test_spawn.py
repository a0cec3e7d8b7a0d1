"""Programs of this package find it in a fresh interpreter; of the environment they get what is meant for them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kfdist.errors import EnvironmentFault
from kfdist.system.spawn import inherited_environment, module_command, with_package

ROOT = str(Path(__file__).resolve().parents[3])


def test_children_get_their_configuration_from_their_file_alone():
    given = {"KFDIST_RUN__SEED": "7", "KFDIST_DEBUG": "1", "PATH": "/bin", "KFDIST_LAUNCH": "x"}
    inherited = inherited_environment(given)
    assert "KFDIST_RUN__SEED" not in inherited
    assert {name: inherited[name] for name in given if name != "KFDIST_RUN__SEED"} == {
        "KFDIST_DEBUG": "1",
        "PATH": "/bin",
        "KFDIST_LAUNCH": "x",
    }


def test_children_find_this_package_and_keep_what_was_on_the_path():
    first, *rest = inherited_environment({"PYTHONPATH": "/elsewhere"})["PYTHONPATH"].split(os.pathsep)
    assert (Path(first) / "kfdist" / "__init__.py").exists() and rest == ["/elsewhere"]


def test_the_package_comes_first_on_the_path():
    assert with_package({"PYTHONPATH": "/a", "HOME": "/b"}) == {"PYTHONPATH": f"{ROOT}{os.pathsep}/a", "HOME": "/b"}
    assert with_package({})["PYTHONPATH"] == ROOT


def test_a_module_runs_whatever_lies_in_the_working_directory(tmp_path: Path):
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    done = subprocess.run(
        module_command("kfdist", "--version"),
        cwd=tmp_path,
        env=with_package(os.environ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_without_an_executable_there_is_a_message(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(EnvironmentFault, match="sys.executable is empty"):
        module_command("kfdist")
