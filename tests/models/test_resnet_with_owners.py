"""ResNet-18 with each method on two ranks, inverted by two owners, adopted as soon as all ranks have it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import kfdist
from benchmarks.architectures import ARCHITECTURES
from kfdist.comm.communicator import Communicator
from kfdist.training.summary import parameter_sha256
from tests.support.ranks import run_ranks
from tests.support.service_methods import service

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

METHODS = ("kfac", "rs-kfac", "b-kfac", "cg-fac", "seng")
STEPS, MAX_STEPS = 6, 60


@dataclass(frozen=True)
class Seen:
    """What a rank saw of a training.

    Attributes:
        losses: Of the steps, on this rank's batch.
        parameters: Digest of the model at the end.
        share: Of the parameters, what is preconditioned.
        waiting: Blocks without an inverse at the end.
        counters: The preconditioner's totals.
        unmeasured: Blocks that were due and not measured.
    """

    losses: list[float]
    parameters: str
    share: float
    waiting: list[str]
    counters: Mapping[str, Any]
    unmeasured: dict[str, str]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with service(tmp_path_factory.mktemp("service")) as address:
        yield address


def train(communicator: Communicator, method: str, address: str) -> Seen:
    """Trains six steps, and on until every block has an inverse."""
    torch.manual_seed(0)
    model = DistributedDataParallel(ARCHITECTURES["resnet18"].build().train())
    torch.manual_seed(1 + communicator.rank)
    loss_on = ARCHITECTURES["resnet18"].batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses, unmeasured, waiting = [], {}, [""]
    link = kfdist.connect(address, run=f"resnet-{method}")
    with kfdist.Preconditioner(model, method, link=link).attach(optimizer) as preconditioner:
        while len(losses) < STEPS or (waiting and len(losses) < MAX_STEPS):
            optimizer.zero_grad()
            loss = loss_on(model)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            unmeasured |= preconditioner.pipeline.capture.unmeasured
            waiting = [name for name, version in preconditioner.versions().items() if version < 0]
        return Seen(
            losses=losses,
            parameters=parameter_sha256(model.named_parameters()),
            share=preconditioner.coverage().share,
            waiting=waiting,
            counters=preconditioner.counters(),
            unmeasured=dict(unmeasured),
        )


@pytest.mark.parametrize("method", METHODS)
def test_resnet18_trains(method: str, address: str) -> None:
    ranks = run_ranks(2, train, method, address, timeout=600)
    print(f"{method}: {[[round(loss, 3) for loss in seen.losses] for seen in ranks]}")
    assert ranks[0].parameters == ranks[1].parameters
    for seen in ranks:
        assert all(map(math.isfinite, seen.losses)) and seen.losses[-1] < seen.losses[0]
        assert seen.share >= ARCHITECTURES["resnet18"].least_share
        assert seen.waiting == [] and seen.unmeasured == {}
        assert seen.counters["inversions"]["failed"] == 0
        for what in ("failures", "fallbacks", "degraded"):
            assert seen.counters[what] == {}, what
