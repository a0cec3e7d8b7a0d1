"""`benchmarks/gpu.py` in its tiny form, which runs on a CPU."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import Task, inversions, main
from kfdist.curvature.inverters import INVERTERS

TINY = Task(device=torch.device("cpu"), tiny=True)


@pytest.fixture(autouse=True)
def threads_restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_it_writes_what_it_measured(tmp_path: Path):
    main(["--tiny", "--seconds", "0.1", "--out", str(tmp_path / "gpu.json")])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["hardware"]["device"] == "cpu" and found["versions"]["torch"]
    assert found["steps"].keys() == {"sgd", "kfdist, local"}
    for each in found["steps"].values():
        assert each["steps"] >= 1 and 0 < each["p50_ms"] <= each["p99_ms"]
    assert found["inversions"].keys() == INVERTERS.keys()


@pytest.mark.parametrize(("method", "jobs"), [("rs-kfac", 2), ("eva", 0)])
def test_an_inversion_is_timed_for_every_block(method: str, jobs: int):
    found = inversions(TINY, method, "cpu")
    assert found["jobs"] == jobs  # those that ranks invert themselves are in the step's seconds
    assert found["step_seconds"] > 0 and (found["seconds"] > 0) == bool(jobs)


def test_what_a_method_refuses_is_told():
    assert "couples Linear layers only" in inversions(TINY, "kfac-tridiagonal", "cpu")["refused"]
