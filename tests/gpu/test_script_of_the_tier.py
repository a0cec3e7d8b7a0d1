"""`run.sh`, with a stand-in for the interpreter: what it runs, and that a part that fails doesn't end it."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.gpu import PARTS

HERE = Path(__file__).parent
ON_A_CPU = {"test_benchmark_of_a_gpu.py", Path(__file__).name}

INTERPRETER = """#!/bin/sh
echo "$*" >>"$CALLS"
case "$*" in
  -) cat >/dev/null; exit "$CHECK" ;;
  *"$FAILING"*) echo "it failed"; exit 3 ;;
esac
"""


class Ran:
    """One run of the script.

    Attributes:
        code: Its exit code.
        said: The lines that it wrote.
        calls: What the interpreter was called with.
        log: What gpu.log has.
    """

    def __init__(self, folder: Path, *, failing: str = "nothing", check: int = 0) -> None:
        folder.mkdir(exist_ok=True)
        python, calls, results = folder / "python", folder / "calls", folder / "results"
        python.write_text(INTERPRETER)
        python.chmod(0o755)
        told = {"PYTHON": str(python), "RESULTS": str(results), "CALLS": str(calls)}
        done = subprocess.run(
            ["bash", str(HERE / "run.sh")],
            env={**os.environ, **told, "FAILING": failing, "CHECK": str(check)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        self.code, self.said = done.returncode, done.stdout.splitlines()
        self.calls = [each for each in calls.read_text().splitlines() if not each.startswith("-m pip")]
        self.log = (results / "gpu.log").read_text().splitlines()


def test_all_files_of_tests_and_the_benchmark_are_run(tmp_path: Path) -> None:
    ran = Ran(tmp_path)
    assert ran.code == 0 and ran.said[-1] == "all passed" and ran.log == ran.said
    named = {word for call in ran.calls for word in call.split() if word.startswith("tests/gpu/")}
    assert named == {f"tests/gpu/{path.name}" for path in HERE.glob("test_*.py") if path.name not in ON_A_CPU}
    parts = [call.split()[2] for call in ran.calls if call.startswith("-m benchmarks.gpu")]
    assert parts == list(PARTS)


@pytest.mark.parametrize(
    ("failing", "name"), [("test_steps.py", "tests/gpu/test_steps.py"), ("benchmarks.gpu gpt", "the benchmark of gpt")]
)
def test_what_failed_is_named_at_the_end_and_the_others_were_run(tmp_path: Path, failing: str, name: str) -> None:
    ran = Ran(tmp_path, failing=failing)
    assert ran.code == 1 and ran.said[-1] == f"failed: {name} (exit code 3)"
    assert "it failed" in ran.log and len(ran.calls) == len(Ran(tmp_path / "again").calls)


def test_the_benchmarks_have_the_time_that_is_kept_for_them() -> None:
    script = (HERE / "run.sh").read_text()
    kept = re.search(r"^benchmark=(\d+)", script, re.MULTILINE)
    limits = [int(limit) for limit in re.findall(r"^  measure \w+ (\d+) \d+$", script, re.MULTILINE)]
    assert kept is not None and len(limits) == len(PARTS) and sum(limits) == int(kept.group(1))


def test_without_a_device_nothing_is_run(tmp_path: Path) -> None:
    ran = Ran(tmp_path, check=1)
    assert ran.code == 1 and ran.calls == ["-"]
