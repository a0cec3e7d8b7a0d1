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
