"""Two disjoint process groups of one job train by themselves."""

import torch
import torch.distributed as dist
from torch import Tensor

import kfdist
from kfdist.comm.communicator import Communicator
from kfdist.comm.reduce import GradientReducer
from tests.support.preconditioning import backward, two_layers
from tests.support.ranks import run_ranks

STEPS = (5, 9)
"""Different on purpose: a group that waited for the other would hang."""


def train(communicator: Communicator, team: int, group: dist.ProcessGroup | None) -> list[Tensor]:
    model = two_layers(team)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reducer = GradientReducer(list(model.parameters()), communicator)
    pre = kfdist.Preconditioner(
        model,
        "rs-kfac" if team else "kfac",
        damping=0.1,
        factor_period=1,
        inverse_period=2,
        lr=0.1,
        adoption=kfdist.FixedLag(team),
        process_group=group,
        digest_period=1,
    )
    with pre:
        for step in range(STEPS[team]):
            optimizer.zero_grad()
            backward(model, seed=100 * team + 10 * communicator.rank + step)
            reducer.reduce()
            pre.step()
            optimizer.step()
        assert min(pre.versions().values()) >= 0
    reducer.close()
    return [parameter.detach() for parameter in model.parameters()]


def alone(communicator: Communicator, team: int) -> list[Tensor]:
    return train(communicator, team, None)


def in_teams(communicator: Communicator) -> list[Tensor]:
    """Ranks 0 and 2 are one team, 1 and 3 the other, so that ranks in a group differ from ranks in the job."""
    groups = [dist.new_group([team, team + 2]) for team in range(2)]
    team = communicator.rank % 2
    group = groups[team]
    assert isinstance(group, dist.ProcessGroup)
    return train(Communicator(group), team, group)


def test_two_disjoint_groups_train_as_if_each_were_alone():
    together = run_ranks(4, in_teams)
    for team in range(2):
        expected = run_ranks(2, alone, team)
        for rank, of_rank in enumerate(expected):
            assert all(torch.equal(a, b) for a, b in zip(together[team + 2 * rank], of_rank, strict=True))
    assert not torch.equal(together[0][0], together[1][0])
