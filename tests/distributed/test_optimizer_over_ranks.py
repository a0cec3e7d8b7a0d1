"""`kfdist.Optimizer` over ranks: the serial steps, equal parameters on all ranks, and states that go on."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kfdist.comm.communicator import Communicator
from kfdist.optim.optimizer import Optimizer
from kfdist.policies.staleness import FixedLag
from tests.support.optimizing import optimizer_of, small_model
from tests.support.preconditioning import rows
from tests.support.ranks import run_ranks
from tests.support.training import FIXED_LAG, events
from tests.support.training import train as run

EXACT = 1e-9
"""float64; ranks add in another order than one process, which inverses at a damping of 0.1 amplify by 1e4 at most."""

LAGGING: dict[str, Any] = {"skip": ("2",), "inverse_period": 2, "adoption": FixedLag(1)}


def part(communicator: Communicator, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = rows(16, seed=seed)
    share = 16 // communicator.world_size
    own = slice(share * communicator.rank, share * (communicator.rank + 1))
    return x[own], y[own]


def steps(communicator: Communicator, model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        x, y = part(communicator, seed)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def train(communicator: Communicator, graft: Any, stop: int | None = None) -> list[torch.Tensor]:
    """Trains six steps; with a stop, in two starts, between which each rank's state is saved."""
    alone = communicator.world_size == 1
    saved: dict[str, Any] = {}
    net = small_model()
    for seeds in [range(6)] if stop is None else [range(stop), range(stop, 6)]:
        model = net if alone else DistributedDataParallel(net)
        with optimizer_of(model, graft=graft, **LAGGING) as optimizer:
            if saved:
                optimizer.load_state_dict(saved)
            steps(communicator, model, optimizer, seeds)
            saved = optimizer.state_dict()
    return [p.detach() for p in net.parameters()]


def assert_alike(found: list[list[torch.Tensor]], expected: list[torch.Tensor], tolerance: float) -> None:
    for of_rank in found:
        for mine, first, serial in zip(of_rank, found[0], expected, strict=True):
            assert torch.equal(mine, first)
            torch.testing.assert_close(mine, serial, rtol=tolerance, atol=tolerance)


def test_two_ranks_step_as_one_process_on_the_whole_batch() -> None:
    for graft in ("adamw", "sgd", None):
        assert_alike(run_ranks(2, train, graft), train(Communicator(None), graft), EXACT)


def test_each_ranks_own_state_goes_on_bit_for_bit() -> None:
    expected = run_ranks(2, train, "adamw")
    assert_alike(run_ranks(2, train, "adamw", 3), expected[0], 0.0)


def train_by_default(communicator: Communicator, stop: int | None = None) -> list[torch.Tensor]:
    """Trains 24 steps with the default method and periods, whose first layer's basis is renewed at step 20."""
    saved: dict[str, Any] = {}
    net = small_model()
    for seeds in [range(24)] if stop is None else [range(stop), range(stop, 24)]:
        model = net if communicator.world_size == 1 else DistributedDataParallel(net)
        with Optimizer(model, lr=0.01, skip=("2",), adoption=FixedLag(1)) as optimizer:
            if saved:
                optimizer.load_state_dict(saved)
            steps(communicator, model, optimizer, seeds)
            saved = optimizer.state_dict()
            versions = [group.snapshot.version for group in optimizer.preconditioner.pipeline.tracks]
            assert versions[0] == (20 if seeds.stop == 24 else 0)
    return [p.detach() for p in net.parameters()]


def test_the_default_steps_as_one_process_and_goes_on_bit_for_bit() -> None:
    """Across the renewal of a basis that comes more often than an inverse period."""
    expected = run_ranks(2, train_by_default)
    assert_alike(expected, train_by_default(Communicator(None)), EXACT)
    assert_alike(run_ranks(2, train_by_default, 13), expected[0], 0.0)


def first_part(communicator: Communicator) -> dict[str, Any]:
    net = small_model()
    model = DistributedDataParallel(net)
    with optimizer_of(model, **LAGGING) as optimizer:
        steps(communicator, model, optimizer, range(3))
        return {"model": net.state_dict(), "optimizer": optimizer.state_dict()}


def second_part(communicator: Communicator, saved: dict[str, Any]) -> list[torch.Tensor]:
    saved = copy.deepcopy(saved)  # tensors that are handed to several processes are one in all of them
    net = small_model()
    net.load_state_dict(saved["model"])
    model = DistributedDataParallel(net)
    with optimizer_of(model, **LAGGING) as optimizer:
        optimizer.load_state_dict(saved["optimizer"])
        steps(communicator, model, optimizer, range(3, 6))
        assert optimizer.preconditioner.next_step == 6
    return [p.detach() for p in net.parameters()]


def test_rank_zeros_state_is_good_for_all_ranks() -> None:
    """HF's Trainer saves on rank 0 alone; what was under way elsewhere is left out."""
    saved = run_ranks(2, first_part)[0]
    found = run_ranks(2, second_part, saved)
    assert_alike(found, found[0], 0.0)


OWN = ("optimizer.name=kfdist", "optimizer.lr=0.01", "run.log_period=8")


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param((), marks=pytest.mark.slow),
        ("optimizer.settings.graft=sgd", "optimizer.lr=0.1", "run.precision=float16"),
        pytest.param(("optimizer.settings.graft=none",), marks=pytest.mark.slow),
    ],
    ids=["adamw", "sgd, float16", "none"],
)
def test_a_configured_run_learns_and_resumes_bit_for_bit(tmp_path: Path, settings: tuple[str, ...]) -> None:
    whole = run(tmp_path / "whole", *FIXED_LAG, *OWN, *settings, ranks=2)
    losses = [line["loss"] for line in events(tmp_path / "whole", "step")]
    assert losses[-1] < 0.9 * losses[0]
    run(tmp_path / "parts", *FIXED_LAG, *OWN, *settings, "run.steps=19", ranks=2)
    parts = run(tmp_path / "parts", *FIXED_LAG, *OWN, *settings, ranks=2)
    assert len({*whole["parameter_sha256"], *parts["parameter_sha256"]}) == 1
