"""A bias that no product adds is left out on all ranks, also on one that never runs its layer."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfdist.comm.communicator import Communicator
from kfdist.errors import KfdistWarning
from tests.support.preconditioning import preconditioner
from tests.support.ranks import run_ranks


class Model(nn.Module):
    """Adds the bias of a layer to something else than its product."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, *, whole: bool) -> Tensor:
        return self.second(torch.tanh(F.linear(x, self.first.weight) * 2 + self.first.bias) if whole else x)


def trained(communicator: Communicator, begins: int) -> tuple[list[Tensor], list[str], list[bool]]:
    """Three steps; rank 0 alone runs the first layer, from step `begins` on; says when its bias kept its gradient."""
    model, kept = Model().double(), []
    with preconditioner(model, "kfac", digest_period=1) as pre:
        for step in range(3):
            model.zero_grad()
            x = torch.randn(6, 4, generator=torch.Generator().manual_seed(communicator.rank), dtype=torch.float64)
            model(x, whole=communicator.rank == 0 and step >= begins).square().sum(1).mean().backward()
            for parameter in model.parameters():
                mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = communicator.all_reduce_sum_(mine) / 2
            assert model.first.bias.grad is not None
            before = model.first.bias.grad.clone()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", KfdistWarning)
                pre.step()
            kept.append(torch.equal(model.first.bias.grad, before))
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter -= 0.1 * parameter.grad
        left_out = [row.parameter for row in pre.coverage().rows if row.block is None]
    return [parameter.detach() for parameter in model.parameters()], left_out, kept


@pytest.mark.parametrize("begins", [0, 1])
def test_a_rank_that_never_runs_a_layer_leaves_its_bias_out_like_the_others(begins: int) -> None:
    (mine, *said), (other, *also_said) = run_ranks(2, trained, begins)
    assert said == also_said == [["first.bias"], [True] * 3]
    assert all(torch.equal(one, two) for one, two in zip(mine, other, strict=True))
