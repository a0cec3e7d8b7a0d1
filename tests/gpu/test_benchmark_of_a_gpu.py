"""`benchmarks/gpu.py` in its tiny form, which runs on a CPU."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Report, Task, inversions, main
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


def test_a_part_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def failing(task: Task, method: str, device: str) -> dict[str, str]:
        if method == "kfac":
            raise RuntimeError("out of memory")
        return {"method": method}

    monkeypatch.setattr(gpu, "inversions", failing)
    monkeypatch.setattr(gpu, "steps", lambda *_: {})
    with pytest.raises(SystemExit, match="failed: inversions, kfac$"):
        main(["--tiny", "--out", str(tmp_path / "gpu.json")])
    found = json.loads((tmp_path / "gpu.json").read_text())["inversions"]
    assert found.keys() == INVERTERS.keys()
    assert found["kfac"] == {"failed": "RuntimeError: out of memory"} and found["seng"] == {"method": "seng"}
    assert 'in failing\n    raise RuntimeError("out of memory")' in capsys.readouterr().err


def test_what_was_measured_is_kept_where_time_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(task: Task, method: str, device: str) -> dict[str, str]:
        if method == "kfac":
            raise KeyboardInterrupt
        return {"method": method}

    monkeypatch.setattr(gpu, "inversions", interrupted)
    monkeypatch.setattr(gpu, "steps", lambda *_: {"steps": 7})
    with pytest.raises(KeyboardInterrupt):
        main(["--tiny", "--out", str(tmp_path / "gpu.json")])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["steps"]["sgd"] == {"steps": 7} and list(found["inversions"]) == ["rs-kfac", "sre-kfac"]
    assert [each.name for each in tmp_path.iterdir()] == ["gpu.json"]


def test_nothing_more_is_measured_on_a_device_that_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    report = Report(path=tmp_path / "gpu.json", device=torch.device("cuda"), facts={})
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    report.add("inversions", "kfac", lambda: {"jobs": 1})
    report.add("inversions", "seng", lambda: pytest.fail("it was tried"))
    assert report.failures == ["inversions, seng"] and report.parts["inversions"]["kfac"] == {"jobs": 1}
    assert "an illegal memory access" in report.parts["inversions"]["seng"]["failed"]
