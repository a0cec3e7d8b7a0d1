"""Any number of ranks steps as one process on the union of their batches, and all decide alike."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kfdist
from kfdist.comm.communicator import Communicator
from kfdist.curvature.inverters.kfac import KfacEigen
from kfdist.errors import LossNotFinite
from tests.support.ranks import run_ranks

STEPS = 6

EXACT = 1e-10
"""float64 sums in another order differ by a few units of 1e-15; 1e-10 leaves room for the inverses of six steps."""


def network() -> nn.Module:
    """Its LayerNorm has no block, so that its parameters take the scaled gradient."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()


def shares(step: int, world_size: int, ragged: bool) -> list[tuple[Tensor, Tensor]]:
    """Every rank's batch at a step; ragged: the last one's is half as long."""
    generator = torch.Generator().manual_seed(step)
    batches = []
    for rank in range(world_size):
        n = 4 if ragged and rank == world_size - 1 else 8
        x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
        batches.append((x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3:].sum(1)], dim=1)))
    return batches


def train(communicator: Communicator, fisher: str, ragged: bool, world_size: int) -> dict[str, Any]:
    """Trains for a few steps; a world of one gets the union of the batches."""
    model = network()
    pre = kfdist.Preconditioner(
        model,
        KfacEigen(damping_rule="pi"),
        factor_period=1,
        inverse_period=2,
        fisher=fisher,
        kl_clip=None,
        adoption=kfdist.FixedLag(0),
    )
    settings = kfdist.AdaptiveSettings(damping_period=2, gamma_period=3)
    adaptive = kfdist.AdaptiveStep(pre, weight_decay=1e-3, damping=0.1, settings=settings)
    numbers = []
    for step in range(STEPS):
        batches = shares(step, world_size, ragged)
        if communicator.world_size > 1:
            x, y = batches[communicator.rank]
        else:
            x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])

        def closure(x: Tensor = x, y: Tensor = y) -> tuple[Tensor, Tensor]:
            output = model(x)
            return output, functional.mse_loss(output, y)

        report = adaptive.step(closure)
        rho = float("nan") if report.rho is None else report.rho
        numbers.append(
            [report.loss, rho, report.alpha, report.momentum, report.damping, report.gamma, float(report.accepted)]
        )
    pre.close()
    result = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {**result, "numbers": torch.tensor(numbers, dtype=torch.float64)}


@pytest.mark.parametrize(
    ("fisher", "ragged", "world_size"), [("empirical", False, 2), ("exact", True, 2), ("empirical", True, 3)]
)
def test_ranks_equal_one_process_on_the_union(fisher: str, ragged: bool, world_size: int):
    torch.set_num_threads(1)
    serial = train(Communicator(None), fisher, ragged, world_size)
    everyone = run_ranks(world_size, train, fisher, ragged, world_size)
    for of_rank in everyone:
        for name, expected in serial.items():
            torch.testing.assert_close(
                of_rank[name], expected, rtol=EXACT, atol=EXACT, msg=lambda m, n=name: f"{n}: {m}"
            )
            assert torch.equal(of_rank[name], everyone[0][name])  # bitwise


class Saturating(nn.Module):
    """Flattens where the step goes, so that the quadratic model promises too much."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.layer.weight, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.atan(self.layer(x))


def overshoot(communicator: Communicator) -> tuple[bool, float, float]:
    """The loss falls on rank 0, whose input is 0.1, and rises on the others and in the mean."""
    model = Saturating().double()
    x = torch.full((4, 1), 0.1 if communicator.rank == 0 else 1.0, dtype=torch.float64)
    pre = kfdist.Preconditioner(
        model,
        KfacEigen(damping_rule="pi"),
        factor_period=1,
        inverse_period=1,
        kl_clip=None,
        adoption=kfdist.FixedLag(0),
    )
    adaptive = kfdist.AdaptiveStep(pre, damping=1e-6)
    report = adaptive.step(lambda: (z := model(x), functional.mse_loss(z, torch.zeros_like(z))))
    pre.close()
    return report.accepted, model.layer.weight.item(), adaptive.damping


def test_a_step_is_taken_back_on_all_ranks_or_none():
    first, *others = run_ranks(3, overshoot)
    accepted, weight, damping = first
    assert not accepted and weight == 2.0 and damping > 1e-6
    assert all(other == first for other in others)


def bad_batch(communicator: Communicator) -> str:
    """Rank 1's first batch holds a NaN; afterwards all train on."""
    model = network()
    pre = kfdist.Preconditioner(
        model,
        KfacEigen(damping_rule="pi"),
        factor_period=1,
        inverse_period=1,
        kl_clip=None,
        adoption=kfdist.FixedLag(0),
    )
    adaptive = kfdist.AdaptiveStep(pre)
    x, y = shares(0, 2, ragged=False)[communicator.rank]

    def closure(value: float) -> tuple[Tensor, Tensor]:
        output = model(x * value)
        return output, functional.mse_loss(output, y)

    with pytest.raises(LossNotFinite) as raised:
        adaptive.step(lambda: closure(float("nan") if communicator.rank == 1 else 1.0))
    assert adaptive.step(lambda: closure(1.0)).accepted
    pre.close()
    return str(raised.value)


def test_one_ranks_bad_batch_is_told_on_all():
    assert len(set(run_ranks(2, bad_batch))) == 1


def train_on_parts(communicator: Communicator) -> dict[str, Any]:
    """Trains with curvature of parts, other ones on each rank; all ranks take the same steps all the same."""
    model, calls = network(), []
    with kfdist.AdaptiveStep.for_model(model, "mse", weight_decay=1e-3) as adaptive:

        def closure(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            calls.append(x[:, 0].detach().clone())
            output = model(x)
            return output, functional.mse_loss(output, y)

        reports = [adaptive.step(closure, *shares(0, 2, ragged=False)[communicator.rank]) for _ in range(12)]
    return {
        "parameters": torch.cat([p.detach().flatten() for p in model.parameters()]),
        "losses": torch.tensor([report.loss for report in reports], dtype=torch.float64),
        "rows": calls[1],
    }


def test_ranks_that_measure_parts_of_their_own_take_the_same_steps():
    one, other = run_ranks(2, train_on_parts)
    assert torch.equal(one["parameters"], other["parameters"])
    assert torch.equal(one["losses"], other["losses"])
    assert one["losses"][-1] < 0.3 * one["losses"][0]
    assert not torch.equal(one["rows"], other["rows"])
