"""EKFAC's scales are those of the step at which a basis comes into use, over all ranks, then averaged in that basis."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfdist
from kfdist.comm.communicator import Communicator
from kfdist.comm.reduce import GradientReducer
from kfdist.curvature.averages import decay_at
from kfdist.curvature.blocks import Block
from kfdist.curvature.inverters.ekfac import EkfacBasis
from kfdist.policies.schedule import Schedule
from kfdist.policies.staleness import FixedLag
from tests.support.faults import EACH, Faults
from tests.support.faulty.link import FaultyLink
from tests.support.ranks import run_ranks
from tests.support.small_models import images

STEPS, BATCH, DECAY, SPOILED = 14, 3, 0.6, 6


def example_gradients(model: nn.Module, pre: kfdist.Preconditioner, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Returns each example's gradient by block, `[n, c, p, q]`."""
    found: dict[str, list[Tensor]] = {block.name: [] for block in blocks_of(pre)}
    with pre.paused():
        for x, y in zip(*batch, strict=True):
            model.zero_grad()
            nn.functional.cross_entropy(model(x[None]), y[None]).backward()
            for block in blocks_of(pre):
                found[block.name].append(block.gradient().clone())
    model.zero_grad()
    return {name: torch.stack(each) for name, each in found.items()}


def blocks_of(pre: kfdist.Preconditioner) -> list[Block]:
    return [block for group in pre.groups for block in group.blocks]


def train(communicator: Communicator, adoption: Any, factor_period: int) -> dict[str, list[tuple[int, int]]]:
    """Trains and compares the memory with the truth at every step; returns (version, step) of the adoptions by group.

    At one step rank 1's batch is not finite.
    """
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, stride=2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)]
    model = nn.Sequential(*layers).double()
    reducer = GradientReducer(list(model.parameters()), communicator)
    reducer.no_overlap()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = kfdist.Preconditioner(
        model,
        "ekfac",
        damping=0.1,
        ema_decay=DECAY,
        factor_period=factor_period,
        inverse_period=4,
        kl_clip=None,
        adoption=adoption,
        link=FaultyLink() if adoption == "asap" else None,
    )
    schedule = Schedule(factor_period=factor_period, inverse_period=4, groups=len(pre.groups))
    expected: dict[str, dict[str, Tensor]] = {}
    foldings: dict[str, int] = {}
    adoptions: dict[str, list[tuple[int, int]]] = {group.name: [] for group in pre.groups}
    for step in range(STEPS):
        x, y = images(BATCH * communicator.world_size, seed=step)
        usable = BATCH if step == SPOILED else len(x)
        gradients = example_gradients(model, pre, (x[:usable], y[:usable]))
        mine = slice(BATCH * communicator.rank, BATCH * (communicator.rank + 1))
        spoiled = step == SPOILED and communicator.rank == 1
        nn.functional.cross_entropy(model(x[mine] * (torch.nan if spoiled else 1.0)), y[mine]).backward()
        reducer.reduce()
        if step == SPOILED:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        report = pre.step()
        for group in pre.groups:
            name = group.name
            basis = pre.inverses()[name]
            assert isinstance(basis, EkfacBasis)
            measured = (basis.Q_G.mT @ gradients[name] @ basis.Q_A).square().sum(0)
            versions = [version for adopted, version in report.adopted if adopted == name]
            if versions:
                adoptions[name].append((versions[0], step))
                foldings[name] = 0
            if versions or schedule.folds(group.index, step):
                foldings[name] += 1
                rho = decay_at(foldings[name], DECAY)
                weight = torch.tensor((1 - rho) * usable, dtype=torch.float64)
                new = {"scales": measured * (1 - rho), "examples": weight}
                old = expected.get(name, {})
                expected[name] = {key: each + rho * old[key] if rho else each for key, each in new.items()}
            memory = pre.state_dict()["memories"][name]["kept"]
            for key, truth in expected[name].items():
                atol = 1e-10 * float(truth.abs().max())
                torch.testing.assert_close(
                    memory[key], truth, rtol=1e-10, atol=atol, msg=lambda m, s=step, n=name, k=key: f"{s} {n} {k}: {m}"
                )
        optimizer.step()
    pre.close()
    reducer.close()
    return adoptions


@pytest.mark.parametrize(
    ("adoption", "factor_period"),
    [pytest.param(FixedLag(0), 1, marks=pytest.mark.slow), (FixedLag(2), 4), ("asap", 2)],
    ids=["synchronous", "fixed-lag", "asap"],
)
def test_scales_are_those_of_the_step_of_adoption_and_then_averaged(
    faults: Faults, adoption: Any, factor_period: int
) -> None:
    if adoption == "asap":
        faults.at(result=EACH).late(3)
    first, second = run_ranks(2, train, adoption, factor_period)
    assert first == second
    for adopted in first.values():
        if isinstance(adoption, FixedLag):
            assert len(adopted) > 2
            assert {step - version for version, step in adopted[1:]} == {adoption.lag}
        else:
            assert len(adopted) > 1
            assert all(step > version for version, step in adopted[1:])
