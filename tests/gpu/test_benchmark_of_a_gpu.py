"""`benchmarks/gpu.py` in its tiny form, which runs on a CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Report, main
from benchmarks.gpu_clock import Spans
from benchmarks.gpu_inversions import inversions, served_gpus
from benchmarks.gpu_rates import shares
from benchmarks.gpu_steps import compared, variants_of
from benchmarks.gpu_tasks import LARGE, TINY, Task
from kfdist.curvature.inverters import INVERTERS

pytestmark = pytest.mark.filterwarnings("ignore:.*output gradients are exactly zero:kfdist.errors.KfdistWarning")
"""Of two layers, one of which sees a class token alone, half of those measured at a step may be of that one."""

CPU = torch.device("cpu")
SMALL = Task(TINY["resnet50"], CPU)
VARIANTS = {
    "resnet50": {"sgd": "", "rs-kfac, owner on cpu": "sgd"},
    "gpt": {"adamw": "", "kfdist.Optimizer": "adamw", "sgd": "", "rs-kfac": "sgd"},
    "vit": {"adamw": "", "kfdist.Optimizer": "adamw", "sgd": "", "rs-kfac": "sgd"},
}
"""What each is compared with, by the model."""


@pytest.fixture(autouse=True)
def threads_restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def measured(tmp_path: Path, *words: str, seconds: float = 0.1) -> dict[str, Any]:
    """Runs the benchmark, and returns what is in its file."""
    main([*words, "--tiny", "--seconds", str(seconds), "--out", str(tmp_path / "gpu.json")])
    return json.loads((tmp_path / "gpu.json").read_text())


@pytest.mark.parametrize("part", LARGE)
def test_it_writes_what_steps_took(tmp_path: Path, part: str):
    found = measured(tmp_path, part)[part]
    assert found["hardware"]["device"] == "cpu" and found["versions"]["torch"] and found["measured"]
    assert (found["factor_period"], found["inverse_period"]) == (10, 100)
    assert found["card"]["tflops of a product"].keys() == {"bf16", "tf32", "float32"}
    assert found["steps"].keys() == VARIANTS[part].keys()
    for name, each in found["steps"].items():
        assert each["steps"] >= 1 and 0 < each["p50_ms"] <= each["p99_ms"] <= each["max_ms"]
        assert 0 <= each["loss"] < 20
        assert ("parts" in each) == bool(VARIANTS[part][name])
    behind = {name for name, beside in VARIANTS[part].items() if beside}
    assert found["compared"].keys() == found["share of the card's rate"].keys() == behind
    for name in behind:
        said, rates = found["steps"][name], found["share of the card's rate"][name]
        assert found["compared"][name]["beside"] == VARIANTS[part][name]
        assert said["blocks"] > 1 and 0 < said["share_preconditioned"] <= 1
        assert rates["statistics"].keys() == rates["application"].keys() == {"bf16", "tf32", "float32"}
        assert all(share > 0 for of_part in rates.values() for share in of_part.values())


def test_it_writes_what_inversions_took(tmp_path: Path):
    found = measured(tmp_path, "inversions")["inversions"]
    assert found["methods"].keys() == INVERTERS.keys() and found["steps"]["sgd"]["mean_ms"] > 0
    assert found["methods"]["rs-kfac"]["factors"] == 4
    assert found["one owner on the card"]["rs-kfac"]["gpus_of_one_owner"] >= 0


@pytest.mark.parametrize(("method", "jobs"), [("rs-kfac", 2), ("eva", 0)])
def test_an_inversion_is_timed_for_every_block(method: str, jobs: int):
    found = inversions(SMALL, method, "cpu")
    assert found["jobs"] == jobs  # those that ranks invert themselves are in the step's seconds
    assert found["step_seconds"] > 0 and (found["seconds"] > 0) == bool(jobs)


def test_what_a_method_refuses_is_told():
    assert "couples Linear layers only" in inversions(SMALL, "kfac-tridiagonal", "cpu")["refused"]


def test_the_large_models_are_those_that_are_meant():
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in each.model().parameters()) for name, each in LARGE.items()}
    assert sizes == {"resnet50": 25_557_032, "gpt": 124_475_904, "vit": 86_567_656}
    assert LARGE.keys() == TINY.keys() == VARIANTS.keys()


def test_steps_are_compared_by_what_the_goal_is_of():
    took = {"mean_ms": 100.0, "p50_ms": 99.0, "p99_ms": 110.0, "peak_gb": 20.0}
    more = {"mean_ms": 104.0, "p50_ms": 99.0, "p99_ms": 132.0, "peak_gb": 21.5}
    variants = variants_of("gpt", SMALL, threads=1, tiny=True)
    assert compared(variants, {"sgd": took, "rs-kfac": more, "adamw": {"failed": "out of memory"}}) == {
        "rs-kfac": {
            "beside": "sgd",
            "mean_ratio": 1.04,
            "p50_ratio": 1.0,
            "p99_ratio": 1.2,
            "mean_within_5_percent": True,
            "p99_within_10_percent": False,
            "more_gb": 1.5,
        }
    }


def test_an_owner_serves_as_many_gpus_as_its_seconds_leave_room_for():
    assert served_gpus(0.9, 100.0) == {"gpus_of_one_owner": 10, "shortest_step_ms": 10.0}
    assert served_gpus(18.0, 100.0)["gpus_of_one_owner"] == 0


def test_operations_and_time_of_a_method_are_those_of_its_calls():
    class Multiplies:
        def twice(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a @ b) @ b

    spans, call = Spans(CPU), Multiplies().twice
    whole, (a, b) = Multiplies.twice, torch.ones(2, 8, 8)
    with spans.over(Multiplies, "twice"):
        assert torch.equal(Multiplies().twice(a, b), call(a, b))
        spans.counts = True
        Multiplies().twice(a, b)
    assert Multiplies.twice is whole
    assert spans.operations == 2 * 2 * 8**3 and spans.milliseconds() > 0
    assert shares({"one": {"tflops": 3.0}, "other": {"ms_a_step": 1.0}}, {"bf16": 4.0}) == {"one": {"bf16": 0.75}}


def failing(task: Task, method: str, device: str) -> dict[str, str]:
    if method == "kfac":
        raise RuntimeError("out of memory")
    return {"method": method}


def test_a_part_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(gpu, "inversions", failing)
    monkeypatch.setattr(gpu, "steps", lambda *_: {})
    with pytest.raises(SystemExit, match="failed: inversions, methods, kfac$"):
        measured(tmp_path, seconds=60)
    found = json.loads((tmp_path / "gpu.json").read_text())["inversions"]["methods"]
    assert found.keys() == INVERTERS.keys()
    assert found["kfac"] == {"failed": "RuntimeError: out of memory"} and found["seng"] == {"method": "seng"}
    assert 'in failing\n    raise RuntimeError("out of memory")' in capsys.readouterr().err


def test_a_variant_that_fails_is_told_and_the_others_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def out_of_memory(task: Task, variant: Any, seconds: float) -> dict[str, float]:
        if variant.name == "kfdist.Optimizer":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"mean_ms": 2.0, "p50_ms": 2.0, "p99_ms": 2.0}

    monkeypatch.setattr(gpu, "steps", out_of_memory)
    with pytest.raises(SystemExit, match=r"failed: gpt, steps, kfdist\.Optimizer$"):
        measured(tmp_path, "gpt", seconds=60)
    found = json.loads((tmp_path / "gpu.json").read_text())["gpt"]
    assert found["compared"].keys() == {"rs-kfac"} and "out of memory" in found["steps"]["kfdist.Optimizer"]["failed"]


def test_what_was_measured_is_kept_where_time_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(task: Task, method: str, device: str) -> dict[str, str]:
        if method == "kfac":
            raise KeyboardInterrupt
        return {"method": method}

    monkeypatch.setattr(gpu, "inversions", interrupted)
    monkeypatch.setattr(gpu, "steps", lambda *_: {"steps": 7})
    measured(tmp_path, "gpt", seconds=60)
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, "resnet50", "inversions", seconds=60)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["gpt"]["steps"]["sgd"] == found["resnet50"]["steps"]["sgd"] == {"steps": 7}
    assert list(found["inversions"]["methods"]) == ["rs-kfac", "sre-kfac"]
    assert [each.name for each in tmp_path.iterdir()] == ["gpu.json"]


def test_nothing_more_is_measured_on_a_device_that_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    report = Report(tmp_path / "gpu.json", torch.device("cuda"), {})
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    report.add("inversions", "methods", "kfac", lambda: {"jobs": 1})
    report.add("inversions", "methods", "seng", lambda: pytest.fail("it was tried"))
    found = report.found("inversions", "methods")
    assert report.failures == ["inversions, methods, seng"] and found["kfac"] == {"jobs": 1}
    assert "an illegal memory access" in found["seng"]["failed"]


def test_a_part_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(["resnet18", "--tiny"])
    assert "there is no part resnet18; there are resnet50, gpt, vit, inversions" in capsys.readouterr().err
