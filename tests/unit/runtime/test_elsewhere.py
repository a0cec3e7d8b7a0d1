"""A whole step on a device that isn't the host's: nothing mixes the two, and the host waits for nothing.

In one process, as on a workstation with a GPU. tests/gpu shows the same on a real one.
"""

import itertools
import time

import pytest
import torch
from torch import Tensor, nn

import kfdist
from kfdist.bench.workloads import SmallGpt
from kfdist.linalg.uploads import sent
from tests.support.captured_methods import CAPTURED
from tests.support.elsewhere import ELSEWHERE, Elsewhere, There, TwoDevices, Waits
from tests.support.on_devices import JOINING, MODELS

TRIED = [
    *((method, "layers" if method in JOINING else "convolutions") for method in CAPTURED),
    *(("rs-kfac", name) for name in ("norms", "lstm", "transformer", "embedding", "sparse embedding")),
]
IN_EVERY_RUN = [(method, "convolutions") for method in ("rs-kfac", "b-kfac", "seng", "eva")] + [
    ("rs-kfac", "norms"),
    ("rs-kfac", "sparse embedding"),
]
"""What has a way of its own to the device and back; the others are in the slow tier."""


@pytest.mark.parametrize(
    ("method", "name"),
    [pytest.param(*each, marks=[] if each in IN_EVERY_RUN else pytest.mark.slow) for each in TRIED],
)
def test_steps_neither_mix_devices_nor_wait(method: str, name: str):
    make, batch = MODELS[name]
    torch.manual_seed(0)
    model = make().double()
    with Elsewhere() as elsewhere:
        elsewhere.move(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, foreach=False)
        batches = [tuple(There(each) for each in batch(8, seed)) for seed in range(4)]
        periods = {"factor_period": 2, "inverse_period": 4, "digest_period": 3}

        def step(x: Tensor, y: Tensor) -> None:
            optimizer.zero_grad()
            for xs, ys in zip(x.chunk(2), y.chunk(2), strict=True):  # of which the noise scale is measured
                (nn.functional.cross_entropy(model(xs), ys) / 2).backward()
            pre.step()
            optimizer.step()

        with kfdist.Preconditioner(model, method, damping=0.1, lr=0.05, **periods) as pre:
            step(*batches[0])  # waits for the first inverses, as documented
            first = pre.versions()
            for x, y in itertools.islice(itertools.cycle(batches), 400):
                with elsewhere.without_waiting():
                    step(x, y)
                if all(version > first[block] for block, version in pre.versions().items()):
                    break
                time.sleep(0.005)  # for the inversions of the background
            else:
                pytest.fail(f"nothing newer was adopted than {pre.versions()}")
            assert all(isinstance(each, There) and bool(each.here.isfinite().all()) for each in model.parameters())


def test_steps_of_the_optimizer_on_a_gpt_neither_mix_devices_nor_wait():
    """With few eigenvectors of each factor and a tied head too wide for a block, as in models of a usual size."""
    torch.manual_seed(0)
    model = SmallGpt(layers=1, width=12, heads=2, context=4, characters=60).double()
    model.head.weight = model.characters.weight
    texts = torch.randint(0, 60, (4, 8, 5))
    bases = kfdist.EkfacAdam(rank=2)
    method = kfdist.ByWidth(dense=bases, wide=bases, eigen=12, sketched=48)
    with Elsewhere() as elsewhere:
        elsewhere.move(model)
        model.head.weight = model.characters.weight  # which a model keeps on its way to a device
        batches = [There(each) for each in texts]
        given = {"factor_period": 2, "inverse_period": 4, "digest_period": 3}
        with kfdist.Optimizer(model, lr=1e-3, method=method, **given) as optimizer:

            def step(text: Tensor) -> None:
                optimizer.zero_grad()
                logits = model(text[:, :-1])
                nn.functional.cross_entropy(logits.flatten(0, -2), text[:, 1:].flatten()).backward()
                optimizer.step()

            step(batches[0])  # waits for the first bases, as documented
            first = optimizer.preconditioner.versions()
            for text in itertools.islice(itertools.cycle(batches), 400):
                with elsewhere.without_waiting():
                    step(text)
                if all(version > first[block] for block, version in optimizer.preconditioner.versions().items()):
                    break
                time.sleep(0.005)  # for the inversions of the background
            else:
                pytest.fail(f"nothing newer was adopted than {optimizer.preconditioner.versions()}")
            assert not optimizer.preconditioner.pipeline.capture.unmeasured
            assert all(isinstance(each, There) and bool(each.here.isfinite().all()) for each in model.parameters())


@pytest.mark.parametrize(
    "waiting",
    [
        float,
        Tensor.cpu,
        torch.nonzero,
        lambda there: there[there > 0],
        torch.linalg.eigh,
        lambda there: torch.where(there > 0, there, torch.tensor(0.0)),
        lambda there: torch.zeros(3).to(ELSEWHERE),
        lambda there: torch.zeros(3).to(ELSEWHERE, non_blocking=True),  # of pageable memory
        lambda there: there.copy_(torch.zeros(3)),
        lambda there: torch.zeros(3).copy_(there),
    ],
)
def test_what_waits_is_found(waiting):
    with Elsewhere() as elsewhere:
        shape = {float: (1,), torch.linalg.eigh: (3, 3)}.get(waiting, (3,))
        there = There(torch.ones(shape))
        waiting(there)
        with elsewhere.without_waiting(), pytest.raises(Waits):
            waiting(there)


def test_what_mixes_devices_is_found():
    with Elsewhere() as elsewhere, elsewhere.without_waiting():
        there = torch.ones(3, device=ELSEWHERE)
        assert (there * torch.tensor(2.0)).device == ELSEWHERE, "a number of the host's is none of its tensors"
        assert sent(torch.ones(3), ELSEWHERE).device == ELSEWHERE
        assert torch.where(there > 0, there, 2.0).device == ELSEWHERE
        for mixed in (lambda: there + torch.ones(3), lambda: there[torch.tensor([0])]):
            with pytest.raises(TwoDevices):
                mixed()
        with pytest.raises(TwoDevices, match="generator of the host"):
            torch.rand(3, device=ELSEWHERE, generator=torch.Generator())
