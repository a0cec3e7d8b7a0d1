"""`kfdist submit` on a Ray cluster of one node with a dashboard: to the end, through faults, and refused."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import Command, Process, process_table, run
from tests.support.launches import LOCAL, SMALL, STEPS, checkpoints_of, summary_of
from tests.support.ray_heads import Head, ray_head
from tests.support.waits import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PATIENCE = 400.0
"""Seconds for what takes 20 on an idle machine."""

ENDLESS = ("--set", f"run.steps={STEPS}", "--set", "run.log_period=20")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head(cpus=4) as started:
        yield started


def submission(head: Head, directory: Path, *arguments: str) -> tuple[str, ...]:
    """Returns the arguments of a submission of a small run with one owner, named like its directory."""
    given = ("--set", f"run.name={directory.name}", "--set", f"run.dir={directory}", "--owners", "1")
    return ("submit", "--ray", head.dashboard, *given, *SMALL, *arguments)


def followed(head: Head, directory: Path, *arguments: str) -> Command:
    """Submits a run and shows its log."""
    return head.kfdist(*submission(head, directory, "--follow", *arguments))


def job_of(head: Head, name: str) -> str:
    """Returns the newest job of a run."""
    return head.jobs(f"kfdist-{name}-")[-1]["submission_id"]


def status_of(head: Head, name: str) -> str:
    return head.jobs(f"kfdist-{name}-")[-1]["status"]


def processes(word: str) -> list[Process]:
    return [process for process in process_table().values() if word in process.title]


def ranks_of(directory: Path) -> list[Process]:
    return processes(f"{directory}/logs/rank-")


def kept_by_train(directory: Path) -> list[int]:
    """Returns the steps of the checkpoints in Ray Train's storage."""
    return sorted(int(path.name.split("-")[1]) for path in directory.glob("*/step-*"))


def test_a_run_trains_and_is_followed_to_its_end(head: Head, tmp_path: Path):
    directory = tmp_path / "whole"
    with followed(head, directory, "--set", "run.steps=60", "--json") as command:
        said = command.expect(0, PATIENCE)
    assert "training on 2 ranks (cpu)" in said and "pool with 1 owners" in said
    told = json.loads(said.splitlines()[-1])
    assert (told["run"], told["status"], told["code"]) == ("whole", "SUCCEEDED", 0)
    summary = summary_of(directory)
    assert (summary["status"], summary["steps"], summary["rank_modules_clean"]) == ("finished", 60, True)
    assert summary["inversions"]["completed"] > 0
    assert checkpoints_of(directory) == [50, 60]
    assert kept_by_train(directory / "ray-train")[-1] == 60  # 50 may have been superseded before it was looked at
    assert "step 60: test loss" in head.job("logs", told["submission_id"])
    with followed(head, directory, "--set", "run.steps=60") as command:
        assert "the run in" in command.expect(0, PATIENCE) and "is finished: 60 steps are done" in command.text


def test_lost_workers_stops_and_lost_files(head: Head, tmp_path: Path):
    directory, storage = tmp_path / "lasting", tmp_path / "storage"
    given = (*ENDLESS, "--storage", str(storage))
    with followed(head, directory, *given) as command:
        controller = command.wait_for_line("controller on ", PATIENCE).partition("controller on ")[2].partition(",")[0]
        eventually(lambda: kept_by_train(storage), bool, seconds=PATIENCE)
        with head.kfdist(*submission(head, directory, *given)) as second:
            assert f"run 'lasting' is being trained by job {job_of(head, 'lasting')}" in second.expect(1, PATIENCE)

        # A worker of Ray Train that dies takes its rank along; all start again from the newest checkpoint.
        before = ranks_of(directory)
        worker = process_table()[before[-1].parent]
        assert "RayTrainWorker" in worker.title
        os.kill(worker.pid, signal.SIGKILL)
        command.wait_for_line("resumed at step ", PATIENCE)
        after = {rank.pid for rank in ranks_of(directory)}
        assert len(after) == 2 and not after & {rank.pid for rank in before}
        shown = json.loads(run("status", "lasting", "--address", controller, "--json"))
        assert shown["epoch"] == 2

        # Ray ends a job within three seconds, and yet the ranks write a checkpoint.
        head.job("stop", job_of(head, "lasting"))
        command.expect(75, PATIENCE)
    assert status_of(head, "lasting") == "STOPPED"
    eventually(lambda: ranks_of(directory), lambda ranks: not ranks, seconds=PATIENCE)
    stopped_at = checkpoints_of(directory)[-1]
    assert summary_of(directory)["steps"] == stopped_at

    # Without the run directory, Ray Train's copies are what is left.
    kept = kept_by_train(storage)
    shutil.rmtree(directory)
    with followed(head, directory, *given) as command:
        resumed_at = int(
            command.wait_for_line("resumed at step ", PATIENCE).partition("resumed at step ")[2].split()[0]
        )
        assert resumed_at in kept  # of the newest, the job may have been killed before Ray Train heard
        assert sorted(path.name for path in (directory / "epochs").iterdir())[-1] == "00003.toml"
        controller = json.loads((directory / "summary.json").read_text())["start"]
        assert controller == 3
        command.wait_for_line(f"/{STEPS}", PATIENCE)
        address = next(line for line in command.output if "controller on " in line).partition("controller on ")[2]
        run("stop", "lasting", "--wait", "--address", address.partition(",")[0])
        said = command.expect(0, PATIENCE)
    # That is what was asked for, so no failure, which something might start again.
    assert "submit again to resume" in said and status_of(head, "lasting") == "SUCCEEDED"
    assert checkpoints_of(directory)[-1] > resumed_at


def test_what_is_wrong_is_one_sentence_and_starts_nothing(head: Head, tmp_path: Path):
    directory = tmp_path / "wrong"
    with head.kfdist(*submission(head, directory, "--workers", "4")) as command:
        said = command.expect(1, PATIENCE)
    assert said.startswith("kfdist: 4 ranks with CPU 1 each and 1 owners with CPU 1 each don't fit: ")
    assert head.jobs("kfdist-wrong-") == []
    # What only the cluster knows is found out there, before anything is started.
    with head.kfdist(*submission(head, directory, "--set", "model.name=digits-cmn")) as command:
        said = command.expect(2, PATIENCE)
    *_, told = said.splitlines()
    assert told.startswith("kfdist: model.name: ") and told.endswith("did you mean 'digits-cnn'?")
    assert "controller" not in head.job("logs", job_of(head, "wrong"))
    assert not directory.exists()


def test_a_launch_of_one_machine_is_a_job_too(head: Head, tmp_path: Path):
    directory = tmp_path / "alone"
    small = " ".join((*SMALL, "--set", f"run.dir={directory}", "--set", "run.steps=40", "--set", "cluster.owners=1"))
    said = head.job("submit", "--", *f"python -m kfdist train {small}".split())
    assert "finished: 40 steps" in said and "succeeded" in said


def test_a_lost_head_ends_the_ranks_and_nothing_that_was_acknowledged_is_lost(head: Head, tmp_path: Path):
    directory = tmp_path / "headless"
    with ray_head(cpus=4) as lost:
        with followed(lost, directory, *ENDLESS, *LOCAL) as command:
            command.wait_for_line(f"/{STEPS}", PATIENCE)
            eventually(lambda: checkpoints_of(directory), bool, seconds=PATIENCE)
            acknowledged = checkpoints_of(directory)[-1]
            for process in lost.command.family():
                if "kfdist worker" not in process.title:  # as if they were on another node
                    os.kill(process.pid, signal.SIGKILL)
            eventually(lambda: ranks_of(directory), lambda ranks: not ranks, seconds=PATIENCE)
            command.wait(PATIENCE)
    with followed(head, directory, *ENDLESS, *LOCAL) as command:
        resumed_at = int(
            command.wait_for_line("resumed at step ", PATIENCE).partition("resumed at step ")[2].split()[0]
        )
        assert resumed_at >= acknowledged
