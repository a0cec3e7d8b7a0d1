"""What an inversion process does before its first job."""

import json

import pytest
import torch

from kfdist.curvature import jobs
from kfdist.owner import child


class Closed:
    """An owner that hears one greeting and is gone."""

    def __init__(self) -> None:
        self.heard: list[dict[str, str]] = []

    def send_bytes(self, data: bytes) -> None:
        self.heard.append(json.loads(data))

    def recv_bytes(self) -> bytes:
        raise EOFError


@pytest.mark.parametrize(("device", "shares"), [("cuda", [0.25]), ("cpu", [])])
def test_it_keeps_to_its_share_of_a_gpus_memory(monkeypatch, device, shares):
    seen: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", seen.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(jobs, "fingerprint", lambda device, threads: f"{device};{threads}")
    owner = Closed()
    child._serve(owner, 3, device, 0.25)  # pyright: ignore[reportArgumentType]
    assert owner.heard == [{"fingerprint": f"{device};3"}]
    assert seen == shares


class OfOneJob(Closed):
    """An owner that gives one job and is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs = [b"job"]

    def recv_bytes(self) -> bytes:
        if not self.jobs:
            raise EOFError
        return self.jobs.pop()


@pytest.mark.parametrize("lost", [False, True])
def test_it_ends_after_an_error_from_which_its_gpu_doesnt_recover(monkeypatch, lost):
    """Else it would answer every later job with that error, and the owner wouldn't replace it."""
    given_back: list[bool] = []

    def raising(payload: bytes, *, device: str) -> bytes:
        raise RuntimeError("an illegal memory access was encountered" if lost else "out of memory")

    def synchronize() -> None:
        if lost:
            raise RuntimeError("an illegal memory access was encountered")

    for name, stand_in in (
        ("is_available", lambda: True),
        ("set_per_process_memory_fraction", lambda share: None),
        ("synchronize", synchronize),
        ("empty_cache", lambda: given_back.append(True)),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    for name, stand_in in (
        ("fingerprint", lambda device, threads: "f"),
        ("job_threads", lambda payload: 1),
        ("run_job", raising),
    ):
        monkeypatch.setattr(jobs, name, stand_in)
    owner = OfOneJob()
    if lost:
        with pytest.raises(RuntimeError, match="an illegal memory access"):
            child._serve(owner, 1, "cuda", 1.0)  # pyright: ignore[reportArgumentType]
        assert len(owner.heard) == 1, "the greeting"
    else:
        child._serve(owner, 1, "cuda", 1.0)  # pyright: ignore[reportArgumentType]
        assert owner.heard[1] == {"kind": "fault", "reason": "RuntimeError: out of memory"} and given_back
