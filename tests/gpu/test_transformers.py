"""A GPT with tied weights and a vision transformer in bfloat16 autocast: small ones of those that are measured.

They have what the other models of this tier lack: packed projections and kernels of attention, norms in float32 among
layers in bfloat16, and a head that has the weight of a table.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path

import pytest
import torch

import kfdist
from benchmarks.gpu_tasks import TINY, Task
from tests.support.traces import SPAN, profiled, waits_in, waits_of
from tests.support.transformers import METHODS, Transformer, float64_loss

pytestmark = pytest.mark.filterwarnings("ignore:.*output gradients are exactly zero:kfdist.errors.KfdistWarning")
"""Of two layers, one of which sees a class token alone, half of those measured at a step may be of that one."""

ON_A_GPU = [pytest.param("cuda", *each, marks=pytest.mark.gpu) for each in product(("gpt", "vit"), METHODS)]


@pytest.mark.parametrize(
    ("device", "name", "method"),
    [("cpu", "gpt", "kfdist.Optimizer"), ("cpu", "vit", "rs-kfac"), *ON_A_GPU],
    indirect=["device"],
)
def test_transformers_train_in_bfloat16_and_no_step_waits(
    device: torch.device, without_waiting: Callable[[], AbstractContextManager[None]], name: str, method: str
):
    with Transformer(name, device, method) as training:
        before, first = float(training.step()), training.pre.versions()  # waits for the first inverses, as documented
        for _ in range(400):
            with without_waiting():
                loss = training.step()
                training.evaluate()
            if all(version > first[block] + 4 for block, version in training.pre.versions().items()):
                break
            time.sleep(0.005)  # for the inversions of the background
        else:
            pytest.fail(f"nothing newer was adopted than {training.pre.versions()}")
        assert float(loss) < before
        assert not training.pre.pipeline.capture.unmeasured
        assert not training.pre.coverage().left_out()


@pytest.mark.parametrize(("device", "name", "method"), [("cpu", "gpt", "rs-kfac"), *ON_A_GPU], indirect=["device"])
def test_the_profiler_sees_no_wait(device: torch.device, tmp_path: Path, name: str, method: str):
    with Transformer(name, device, method) as training:
        for _ in range(20):  # loads the kernels, and has torch pin memory
            training.step()
            time.sleep(0.005)
        training.task.finish()
        with profiled(tmp_path / "trace.json"):
            for _ in range(8):
                training.step()
    assert not waits_of(tmp_path / "trace.json")


def test_the_profiler_sees_what_waits(device: torch.device, tmp_path: Path):
    there = torch.ones(3, device=device)
    with profiled(tmp_path / "trace.json"):
        there.sum().item()
        torch.ones(1 << 18).to(device, non_blocking=True)
    found = waits_of(tmp_path / "trace.json")
    if device.type != "cuda":
        assert not found
        return
    assert any("Synchronize" in each for each in found) and any("Pageable -> " in each for each in found)


def test_waits_are_found_in_a_trace():
    def event(kind: str, name: str, number: int, **more: object) -> dict[str, object]:
        return {"cat": kind, "name": name, "ts": 10, "dur": 1, "args": {"correlation": number, **more}, "ph": "X"}

    span = {"cat": "user_annotation", "name": SPAN, "ts": 5, "dur": 20}
    numbers = iter(range(100))

    def copied(name: str, size: int, ts: int = 10) -> list[dict[str, object]]:
        number = next(numbers)
        called = event("cuda_runtime", "cudaMemcpyAsync", number) | {"ts": ts}
        return [called, event("gpu_memcpy", name, number, bytes=size) | {"ts": 1000}]

    harmless = [
        *copied("Memcpy HtoD (Pinned -> Device)", 1 << 20),
        *copied("Memcpy HtoD (Pageable -> Device)", 64),
        *copied("Memcpy DtoH (Device -> Pinned)", 1 << 20),
        *copied("Memcpy HtoD (Pageable -> Device)", 1 << 20, ts=30),
        event("cuda_runtime", "cudaEventSynchronize", next(numbers)),
        event("cuda_runtime", "cudaStreamSynchronize", next(numbers)) | {"ts": 30},
        {"name": "process_name", "ph": "M"},
    ]
    assert waits_in([span, *harmless]) == []
    waiting = [
        event("cuda_runtime", "cudaStreamSynchronize", next(numbers)),
        event("cuda_runtime", "cudaEventSynchronize", next(numbers)) | {"dur": 500},
        *copied("Memcpy HtoD (Pageable -> Device)", 1 << 20),
        *copied("Memcpy DtoH (Device -> Pageable)", 4),
    ]
    assert waits_in([span, *harmless, *waiting]) == [
        "cudaStreamSynchronize",
        "cudaEventSynchronize",
        "Memcpy HtoD (Pageable -> Device), 1048576 bytes",
        "Memcpy DtoH (Device -> Pageable), 4 bytes",
    ]


@pytest.mark.parametrize("name", ["gpt", "vit"])
def test_what_is_measured_in_bfloat16_is_what_float64_has(device: torch.device, name: str):
    """Sums are kept in float32, whatever the layers compute in."""
    found: list[dict[str, torch.Tensor]] = []
    for where, wide in ((device, False), (torch.device("cpu"), True)):
        task = Task(TINY[name], where)
        model, given = task.make(), {"lr": 0.1, "skip": task.training.skip, "factor_period": 1, "inverse_period": 1}
        model = model.double() if wide else model
        with kfdist.Preconditioner(model, "kfac-eigen", adoption=kfdist.FixedLag(0), **given) as pre:
            if wide:
                float64_loss(model, task).backward()
            else:
                task.backward(model)
            pre.step()
            sums = pre.state_dict()["sums"]
        found.append(
            {f"{block}, {side}": of[side].double().cpu() for block, of in sums.items() for side in "AG" if side in of}
        )
    narrow, exact = found
    assert narrow.keys() == exact.keys() and len(exact) > 6
    off = {each: float((narrow[each] - exact[each]).norm() / exact[each].norm()) for each in exact}
    assert all(value < 0.1 for value in off.values()), off  # bfloat16 has 8 bits
