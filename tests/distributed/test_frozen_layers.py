"""Layers that are frozen for a while, over ranks: the serial steps, and ranks that don't freeze alike are found."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kfdist.comm.communicator import Communicator
from kfdist.comm.reduce import GradientReducer
from kfdist.errors import RanksDiverged
from kfdist.optim.optimizer import Optimizer
from kfdist.policies.staleness import FixedLag
from tests.support.optimizing import small_model
from tests.support.preconditioning import rows
from tests.support.ranks import run_ranks

EXACT = 1e-9
"""float64; ranks add in another order than one process, which inverses at a damping of 0.1 amplify by 1e4 at most."""

WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "ekfac-adam": {"method": "ekfac-adam", "factor_period": 2, "inverse_period": 2},
    "kfac-eigen": {"method": "kfac-eigen", "factor_period": 2, "inverse_period": 2, "damping": 0.1},
    "cg-fac": {"method": "cg-fac", "factor_period": 2, "inverse_period": 2, "damping": 0.1},
    "soap": {"method": "soap", "factor_period": 2, "inverse_period": 2},
}
"""SOAP's bases of a head are of gradients whose columns add up to zero: whatever is added in another order shows."""
FROZEN = {6: "0.", 12: "3.weight"}
"""By the first of six steps: what is frozen in them."""


def train(communicator: Communicator, way: str, by_ddp: bool) -> list[torch.Tensor]:
    """Trains 24 steps, in some of which a layer, or a part of one, is frozen; returns the parameters after each."""
    net = small_model()
    alone, share = communicator.world_size == 1, 16 // communicator.world_size
    model = DistributedDataParallel(net, find_unused_parameters=True) if by_ddp and not alone else net
    reducer = GradientReducer(list(net.parameters()), communicator)
    reducer.no_overlap()
    found = []
    with Optimizer(model, lr=0.01, adoption=FixedLag(1), **WAYS[way]) as optimizer:
        for step in range(24):
            frozen = FROZEN.get(step - step % 6)
            for name, p in net.named_parameters():
                p.requires_grad_(frozen is None or not name.startswith(frozen))
            x, y = rows(16, seed=step)
            own = slice(share * communicator.rank, share * (communicator.rank + 1))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[own]), y[own]).backward()
            if not by_ddp:
                reducer.reduce()
            before = [p.detach().clone() for p in net.parameters()]
            optimizer.step()
            for (name, p), old in zip(net.named_parameters(), before, strict=True):
                assert torch.equal(p, old) is (frozen is not None and name.startswith(frozen)), (step, name)
            found += [p.detach().clone() for p in net.parameters()]
    reducer.close()
    return found


@pytest.mark.parametrize(
    ("way", "by_ddp"),
    [
        ("default", True),
        ("default", False),
        ("ekfac-adam", True),
        pytest.param("kfac-eigen", True, marks=pytest.mark.slow),
        ("cg-fac", True),
    ],
)
def test_two_ranks_step_as_one_process_while_a_layer_is_frozen_and_after_it_is_thawed(way: str, by_ddp: bool) -> None:
    expected = train(Communicator(None), way, by_ddp)
    found = run_ranks(2, train, way, by_ddp)
    for mine, first in zip(*found, strict=True):
        assert torch.equal(mine, first)
    for mine, serial in zip(found[0], expected, strict=True):
        torch.testing.assert_close(mine, serial, rtol=EXACT, atol=EXACT)


def freeze_on_one_rank(communicator: Communicator, way: str) -> str:
    net = small_model()
    reducer = GradientReducer(list(net.parameters()), communicator)
    reducer.no_overlap()
    optimizer = Optimizer(net, lr=0.01, adoption=FixedLag(1), digest_period=1, **WAYS[way])
    step = 0
    try:
        for step in range(12):
            if step == 3 and communicator.rank == 1:
                net[0].requires_grad_(False)
            x, y = rows(8, seed=step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            reducer.reduce()
            optimizer.step()
    except RanksDiverged:
        return f"diverged at step {step}"
    finally:
        reducer.close()
        optimizer.preconditioner.abandon()
    return "not found"


@pytest.mark.parametrize("way", ["default", "cg-fac", "soap"])
def test_a_layer_that_is_frozen_on_one_rank_alone_is_found_and_nothing_hangs(way: str) -> None:
    found = run_ranks(2, freeze_on_one_rank, way)
    assert found[0] == found[1] and found[0].startswith("diverged at step "), found
