"""What `kfdist submit` checks by itself, and what it says of a job that failed."""

import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kfdist.config import load_config
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.launch.submission import submit as submitting
from kfdist.launch.submission.submit import Request, checked, job_fault, submit

GIVEN: dict[str, Any] = {
    "address": "http://127.0.0.1:8265",
    "gpus_per_worker": 0,
    "max_failures": 3,
    "storage": None,
    "working_dir": None,
    "follow": False,
}


def test_where_ranks_compute_follows_from_their_gpus():
    config = load_config(None, overrides=["run.dir=/data/run"], environment={})
    assert checked(config, Request(**GIVEN)).run.device == "cpu"
    assert checked(config, Request(**GIVEN | {"gpus_per_worker": 1})).run.device == "cuda"


@pytest.mark.parametrize(
    ("given", "overrides", "told"),
    [
        ({"address": "10.0.0.1:6379"}, [], "--ray: is '10.0.0.1:6379'; write the dashboard's address"),
        ({}, ["run.dir=runs/digits"], "run.dir: is 'runs/digits'; on a cluster give an absolute path"),
        ({"gpus_per_worker": 2}, [], "--gpus-per-worker: is 2; a rank computes on one GPU"),
        ({}, ["run.device=cuda"], 'run.device: is "cuda", and --gpus-per-worker is 0; make it "cpu" or "auto"'),
        ({"gpus_per_worker": 1}, ["run.device=cpu"], 'run.device: is "cpu", and --gpus-per-worker is 1'),
        ({"working_dir": Path("/no/such")}, [], "--working-dir: is '/no/such', no directory"),
        ({"storage": "results"}, [], "--storage: is 'results'; give an absolute path that all nodes share"),
    ],
)
def test_bad_input_is_refused_before_anybody_is_asked(given: dict[str, Any], overrides: list[str], told: str):
    config = load_config(None, overrides=["run.dir=/data/run", *overrides], environment={})
    with pytest.raises(ConfigError) as caught:
        submit(config, Request(**GIVEN | given), sys.stdout)
    assert str(caught.value).startswith(told)


def test_no_head_is_one_sentence(unused_address: str):
    config = load_config(None, overrides=["run.dir=/data/run"], environment={})
    with pytest.raises(EnvironmentFault) as caught:
        submit(config, Request(**GIVEN | {"address": f"http://{unused_address}"}), sys.stdout)
    assert str(caught.value).startswith(f"no Ray answers at http://{unused_address} (")
    assert "\n" not in str(caught.value)


@pytest.fixture
def unused_address() -> Any:
    import socket

    with socket.socket() as held:  # bound, and nobody listens
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


def test_a_job_that_failed_says_so_in_its_own_words():
    logs = "run digits: files in /data/run\nkfdist: run.steps: is -1; it must be 1 or more\n"
    refused = job_fault("job-1", 2, logs, "")
    assert isinstance(refused, ConfigError) and str(refused) == "run.steps: is -1; it must be 1 or more"
    unfit = job_fault("job-1", 1, logs, "")
    assert isinstance(unfit, EnvironmentFault) and str(unfit).endswith("1 or more\n(said by job job-1)")


def test_a_log_that_was_shown_is_not_shown_again():
    logs = "run digits: files in /data/run\nkfdist: Ray Train gave up; rank 0: lost a peer\nrank 1: killed\n"
    assert str(job_fault("job-1", 1, logs, logs, shown=True)) == (
        "Ray Train gave up; rank 0: lost a peer\n(said by job job-1)"
    )
    assert isinstance(job_fault("job-1", 2, logs, logs, shown=True), ConfigError)
    for unsaid in ("No module named kfdist", "run digits\nkfdist: "):
        assert str(job_fault("job-1", 1, unsaid, "", shown=True)) == "job job-1 failed with 1; its log is above"


def test_a_job_without_kfdist_shows_the_end_of_its_log():
    fault = job_fault("job-1", 1, "Running entrypoint\n/usr/bin/python: No module named kfdist\n", "")
    assert str(fault) == "job job-1 failed with 1:\nRunning entrypoint\n/usr/bin/python: No module named kfdist"


def test_a_job_without_a_log_shows_what_ray_says():
    fault = job_fault("job-1", None, "", "Unexpected error: the runtime environment could not be made")
    assert str(fault) == "job job-1 failed:\nUnexpected error: the runtime environment could not be made"


class Status(str):
    """Ray's word for how a job stands."""

    value = property(str)

    def is_terminal(self) -> bool:
        return self in ("SUCCEEDED", "STOPPED", "FAILED")


class Jobs:
    """Ray's jobs: `listings` is what is listed, one after the other; a job that is submitted and there is refused."""

    def __init__(self, *listings: dict[str, str]) -> None:
        self.listings = list(listings)
        self.submitted: list[str] = []

    def list_jobs(self) -> list[SimpleNamespace]:
        listed = self.listings.pop(0) if len(self.listings) > 1 else self.listings[0]
        return [
            SimpleNamespace(submission_id=name, status=Status(status), metadata={"kfdist_run": "digits"})
            for name, status in listed.items()
        ]

    def submit_job(self, *, submission_id: str, **_: object) -> str:
        if submission_id in self.listings[-1]:
            raise RuntimeError(f"Job with submission_id {submission_id} already exists.")
        self.submitted.append(submission_id)
        return submission_id

    def get_job_status(self, name: str) -> Status:
        return Status("RUNNING")

    def get_job_logs(self, name: str) -> str:
        return "run digits: files in /data/run\n"

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        yield self.get_job_logs(name)


def submitted(jobs: Jobs, monkeypatch: pytest.MonkeyPatch, **given: Any) -> submitting.Job:
    monkeypatch.setattr(submitting, "_connect", lambda address: jobs)
    monkeypatch.setattr(submitting, "_nodes", lambda address: ([], ""))
    monkeypatch.setattr(submitting, "check_room", lambda *_: None)
    config = load_config(None, overrides=["run.dir=/data/run", "run.name=digits"], environment={})
    return submit(config, Request(**GIVEN | given), sys.stdout)


def test_a_job_has_the_next_number_of_its_run(monkeypatch):
    jobs = Jobs({"kfdist-digits-9": "FAILED", "kfdist-digits-10": "STOPPED", "kfdist-digits-old": "FAILED"})
    assert submitted(jobs, monkeypatch).submission_id == "kfdist-digits-11"
    assert jobs.submitted == ["kfdist-digits-11"]


def test_of_two_submissions_of_a_run_at_the_same_time_one_is_refused(monkeypatch):
    before, after = {"kfdist-digits-1": "FAILED"}, {"kfdist-digits-1": "FAILED", "kfdist-digits-2": "RUNNING"}
    jobs = Jobs(before, before, after)
    with pytest.raises(EnvironmentFault, match="run 'digits' is being trained by job kfdist-digits-2; follow it with"):
        submitted(jobs, monkeypatch)
    assert jobs.submitted == []


def test_a_job_that_lives_has_not_failed_where_its_log_breaks_off(monkeypatch):
    monkeypatch.setattr(submitting, "_START_SECONDS", 0.0)
    monkeypatch.setattr(submitting, "_POLL_SECONDS", 0.0)
    with pytest.raises(EnvironmentFault) as caught:
        submitted(Jobs({"kfdist-digits-1": "RUNNING"}), monkeypatch, follow=True)
    assert str(caught.value) == (
        "Ray ended the log of job kfdist-digits-1, which goes on; the same command follows it again"
    )
