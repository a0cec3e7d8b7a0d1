"""Every folder of tests is run by `make test`, in one of its two halves."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_make_test_runs_every_folder() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    run = {
        folder
        for variable in ("ALONE", "TOGETHER")
        for line in re.findall(rf"^{variable} := (.*)$", makefile, re.MULTILINE)
        for folder in line.split()
    }
    there = {
        f"tests/{file.parent.relative_to(ROOT / 'tests').parts[0]}" for file in (ROOT / "tests").rglob("test_*.py")
    }
    assert there <= run
    assert all((ROOT / folder).is_dir() for folder in run)
