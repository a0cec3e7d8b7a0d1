"""Any number of ranks measures and applies what one process on the union of their batches does."""

import pytest
import torch
from torch import nn

import kfdist
from kfdist.comm.communicator import Communicator
from kfdist.comm.reduce import GradientReducer
from kfdist.curvature.averages import means
from tests.support.ranks import run_ranks
from tests.support.small_models import images, small_cnn
from tests.support.tiers import in_turn

STEPS = 4
EXACT = 1e-10
"""float64 sums over at most 64 rows in another order differ by a few units of 1e-15; 1e-10 leaves room for inverses."""


def preconditioner(model: nn.Module, method: str) -> kfdist.Preconditioner:
    return kfdist.Preconditioner(
        model,
        method,
        damping=0.1,
        factor_period=1,
        inverse_period=2,
        kl_clip=1e-2,
        lr=0.1,
        adoption=kfdist.FixedLag(0),
    )


def shares(step: int, world_size: int, case: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every rank's batch at a step: equal ones, or rank 0's non-finite and the last one's half as long."""
    x, y = images(8 * world_size, seed=step)
    batches = [(x[8 * rank : 8 * rank + 8], y[8 * rank : 8 * rank + 8]) for rank in range(world_size)]
    if case == "ragged":
        batches[-1] = (batches[-1][0][:4], batches[-1][1][:4])
    return batches


def train(communicator: Communicator, method: str, case: str, world_size: int) -> dict[str, torch.Tensor]:
    """Trains for a few steps; a world of one gets the union of the finite batches."""
    model = small_cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reducer = GradientReducer(list(model.parameters()), communicator, bucket_bytes=400)
    pre = preconditioner(model, method)
    for step in range(STEPS):
        batches = shares(step, world_size, case)
        if communicator.world_size > 1:
            x, y = batches[communicator.rank]
        else:
            kept = batches[1:] if case == "ragged" else batches
            x, y = torch.cat([x for x, _ in kept]), torch.cat([y for _, y in kept])
        if case == "ragged" and communicator.world_size > 1 and communicator.rank == 0:
            x = x.clone()
            x[0] = torch.nan
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        reducer.reduce()
        if case == "ragged":  # the mean of ragged ranks' gradients is not the union's; their statistics are
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.01)
        pre.step()
        optimizer.step()
    pre.fold()
    state = pre.state_dict()
    result = {f"{block}.{key}": mean for block, sums in state["sums"].items() for key, mean in means(sums).items()}
    result.update({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    pre.close()
    reducer.close()
    return result


@pytest.mark.parametrize(
    ("method", "world_size", "case"), in_turn(["kfac", "kfac-eigen"], [2, 4], ["equal", "ragged"], of=2)
)
def test_ranks_equal_one_process_on_the_union(method: str, world_size: int, case: str) -> None:
    torch.set_num_threads(1)
    serial = train(Communicator(None), method, case, world_size)
    for of_rank in run_ranks(world_size, train, method, case, world_size):
        for name, expected in serial.items():
            torch.testing.assert_close(
                of_rank[name], expected, rtol=EXACT, atol=EXACT, msg=lambda m, n=name: f"{n}: {m}"
            )
