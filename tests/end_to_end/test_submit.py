"""`kfdist submit` on a Ray cluster of one node with a dashboard."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.launches import SMALL, checkpoints_of, summary_of
from tests.support.ray_heads import Head, ray_head

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head(cpus=4) as started:
        yield started


def submission(head: Head, directory: Path, name: str, *arguments: str) -> tuple[str, ...]:
    """Returns the arguments of a submission of a small run with one owner."""
    given = ("--set", f"run.name={name}", "--set", f"run.dir={directory}", "--owners", "1", *SMALL, *arguments)
    return ("submit", "--ray", head.dashboard, *given)


def kept_by_train(directory: Path, name: str) -> list[int]:
    """Returns the steps of the checkpoints in Ray Train's storage."""
    return sorted(int(path.name.split("-")[1]) for path in (directory / "ray-train" / name).glob("step-*"))


def test_a_run_trains_is_followed_to_its_end_and_resumes(head: Head, tmp_path: Path):
    directory = tmp_path / "run"
    first = submission(head, directory, "whole", "--set", "run.steps=60", "--follow")
    with head.kfdist(*first) as command:
        said = command.expect(0)
    assert "training on 2 ranks (cpu)" in said and "pool with 1 owners" in said
    summary = summary_of(directory)
    assert (summary["status"], summary["steps"], summary["rank_modules_clean"]) == ("finished", 60, True)
    assert summary["inversions"]["completed"] > 0
    assert checkpoints_of(directory) == [50, 60]
    assert kept_by_train(directory, "whole")[-1] == 60  # 50 may have been superseded before it was looked at
    (job,) = [name for name in head.jobs() if "whole" in name]
    assert head.jobs()[job] == "SUCCEEDED"
    assert "step 60: test loss" in head.job("logs", job)
    again = submission(head, directory, "whole", "--set", "run.steps=80", "--follow", "--json")
    with head.kfdist(*again) as command:
        said = command.expect(0)
    assert "resumed at step 60" in said
    assert json.loads(said.splitlines()[-1])["code"] == 0
    assert summary_of(directory)["steps"] == 80
