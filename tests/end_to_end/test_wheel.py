"""The wheel, installed away from the checkout, has everything that a run needs."""

import json
import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.launches import LOCAL, ONE_RANK

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the wheel from a copy, so that the checkout stays clean, with the installed setuptools."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(".git", ".venv*", "runs", "build", "dist", "*.egg-info", "__pycache__"),
    )
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(work), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(work.glob("*.whl"))


@pytest.fixture(scope="module")
def outside(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes an empty environment with this wheel; its dependencies are borrowed, to be neither fetched nor copied."""
    home = tmp_path_factory.mktemp("outside")
    venv.create(home / "venv", with_pip=False)
    python = home / "venv" / "bin" / "python"
    packages = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    )
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    borrowed = home / "borrowed"
    borrowed.mkdir()
    for entry in Path(site.getsitepackages()[0]).iterdir():
        # Everything but kfdist: the editable install's finder and .pth would point back into the checkout.
        if "kfdist" not in entry.name:
            (borrowed / entry.name).symlink_to(entry)
    (packages / "borrowed.pth").write_text(f"{borrowed}\n")
    return home


def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert "kfdist/py.typed" in names
    assert "kfdist/rpc/_generated/kfdist/v1/run.proto" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    with zipfile.ZipFile(wheel) as archive:
        scripts = next(archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert "kfdist = kfdist.cli.main:main" in scripts
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "kfdist").rglob("*.py")}
    assert modules <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"kfdist"}


def _train(outside: Path, *arguments: str) -> dict[str, Any]:
    """Trains in the environment of the wheel, with nothing of the checkout in reach; returns the summary."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [
        str(outside / "venv" / "bin" / "python"),
        "-m",
        "kfdist",
        "train",
        "--json",
        "--set",
        "run.eval_period=0",
    ]
    done = subprocess.run([*command, *arguments], cwd=outside, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_an_installed_wheel_trains_outside_the_checkout(outside: Path):
    summary = _train(outside, *LOCAL, *ONE_RANK, "--set", "run.name=alone", "--set", "run.steps=3")
    assert summary["status"] == "finished" and summary["steps"] == 3
    assert (outside / "runs" / "alone" / "summary.json").exists()


@pytest.mark.slow
def test_an_installed_wheel_has_the_whole_service(outside: Path):
    summary = _train(outside, "--set", "run.steps=20")
    assert summary["status"] == "finished" and summary["steps"] == 20
    assert summary["inversions"]["completed"] > 0 and summary["bytes"]["to_owners"] > 0
    assert (outside / "runs" / "digits" / "summary.json").exists()
