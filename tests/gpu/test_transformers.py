"""A GPT with tied weights and a vision transformer, small ones, as the benchmark trains them: in bfloat16 autocast.

They have what the other models of this tier lack: attention's packed projections and its kernels, norms in float32 among
layers in bfloat16, and a head that has the weight of a table.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn

import kfdist
from benchmarks.gpu_tasks import TINY, Task

PERIODS = {"factor_period": 2, "inverse_period": 4}


def stepped(model: nn.Module, task: Task, method: str) -> tuple[torch.optim.Optimizer, kfdist.Preconditioner]:
    """Returns what steps a model, and the preconditioner in its steps."""
    if method == "kfdist.Optimizer":
        # Wide layers, those with few eigenvectors, and a head that is too wide for a block, as in a model of a usual size.
        bases = kfdist.EkfacAdam(rank=2)
        by_width = kfdist.ByWidth(dense=bases, wide=bases, eigen=16, sketched=64)
        optimizer = kfdist.Optimizer(model, lr=1e-3, method=by_width, **PERIODS)
        return optimizer, optimizer.preconditioner
    sgd = torch.optim.SGD(model.parameters(), lr=task.training.sgd_lr)
    return sgd, kfdist.Preconditioner(model, method, skip=task.training.skip, **PERIODS).attach(sgd)


def evaluate(model: nn.Module, x: torch.Tensor) -> None:
    """Runs a model as for a validation, where attention has a kernel of its own."""
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()


@pytest.mark.parametrize("method", ["kfdist.Optimizer", "rs-kfac"])
@pytest.mark.parametrize("name", ["gpt", "vit"])
def test_transformers_train_in_bfloat16_and_no_step_waits(
    device: torch.device, without_waiting: Callable[[], AbstractContextManager[None]], name: str, method: str
):
    task = Task(TINY[name], device)
    model = task.make()
    optimizer, pre = stepped(model, task, method)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = task.backward(model)
        optimizer.step()
        return loss

    with pre:
        before, first = float(step()), pre.versions()  # waits for the first inverses, as documented
        for _ in range(400):
            with without_waiting():
                loss = step()
                evaluate(model, task.batch[0])
            if all(version > first[block] + 4 for block, version in pre.versions().items()):
                break
            time.sleep(0.005)  # for the inversions of the background
        else:
            pytest.fail(f"nothing newer was adopted than {pre.versions()}")
        assert float(loss) < before
        assert not pre.pipeline.capture.unmeasured
        assert not pre.coverage().left_out()


@pytest.mark.parametrize("name", ["gpt", "vit"])
def test_what_is_measured_in_bfloat16_is_what_float64_has(device: torch.device, name: str):
    """Sums are kept in float32, whatever the layers compute in."""
    found: list[dict[str, Any]] = []
    for where, wide in ((device, False), (torch.device("cpu"), True)):
        task = Task(TINY[name], where)
        model, given = task.make(), {"lr": 0.1, "skip": task.training.skip, "factor_period": 1, "inverse_period": 1}
        model = model.double() if wide else model
        with kfdist.Preconditioner(model, "kfac-eigen", adoption=kfdist.FixedLag(0), **given) as pre:
            if wide:
                x, y = (each.double() if each.is_floating_point() else each for each in task.batch)
                nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
            else:
                task.backward(model)
            pre.step()
            sums = pre.state_dict()["sums"]
        found.append({f"{block}, {side}": of[side].double().cpu() for block, of in sums.items() for side in "AG" if side in of})
    narrow, exact = found
    assert narrow.keys() == exact.keys() and len(exact) > 8
    off = {each: float((narrow[each] - exact[each]).norm() / exact[each].norm()) for each in exact}
    assert all(value < 0.1 for value in off.values()), off  # bfloat16 has 8 bits
