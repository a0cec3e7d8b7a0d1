"""Three methods of different placements in one model, by name pattern."""

from typing import Any

import torch
from torch import Tensor, nn

import kfdist
from kfdist.comm.communicator import Communicator
from kfdist.comm.reduce import GradientReducer
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.inverters.cg_fac import ConjugateGradient
from kfdist.linalg.cg import CgSolution
from kfdist.policies.staleness import FixedLag
from tests.support.faults import EACH, Faults
from tests.support.faulty.link import FaultyLink
from tests.support.ranks import run_ranks
from tests.support.small_models import images

BATCH = 4
METHODS = {
    "conv": make_inverter("rs-kfac", rank=6, oversampling=2),
    "fc*": make_inverter("b-kfac", rank=4, increment_rows=8),
    "head": make_inverter("cg-fac", solve="owner", warm_start=True),
}


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, stride=2, dtype=torch.float64)
        self.fc = nn.Linear(16, 14, dtype=torch.float64)
        self.head = nn.Linear(14, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc(torch.tanh(self.conv(x)).flatten(1))))


def train(communicator: Communicator, adoption: Any, steps: int) -> dict[str, Any]:
    """Trains on this rank's share of the batches and counts how often it solved for the head."""
    solved, solution = 0, ConjugateGradient.solution

    def counted(self: ConjugateGradient, gradient: Tensor, damping: float, start: Tensor | None = None) -> CgSolution:
        nonlocal solved
        solved += 1
        return solution(self, gradient, damping, start)

    ConjugateGradient.solution = counted
    model = Mixed()
    reducer = GradientReducer(list(model.parameters()), communicator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = kfdist.Preconditioner(
        model,
        METHODS,
        damping=0.1,
        factor_period=1,
        inverse_period=2,
        kl_clip=1e-2,
        lr=0.1,
        adoption=adoption,
        link=FaultyLink(),
        digest_period=1,
    )
    share = 2 * BATCH // communicator.world_size
    mine = slice(share * communicator.rank, share * (communicator.rank + 1))
    for step in range(steps):
        x, y = images(2 * BATCH, seed=step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[mine]), y[mine]).backward()
        reducer.reduce()
        pre.step()
        optimizer.step()
    counters, versions = pre.counters(), pre.versions()
    found = {
        "parameters": [parameter.detach().clone() for parameter in model.parameters()],
        "coverage": {row.block: (row.method, row.reason) for row in pre.coverage().rows},
        "versions": versions,
        "by_method": counters["inversions"]["by_method"],
        "failures": counters["failures"],
        "solved": solved,
        "couriers": {group.name: group.courier_rank for group in pre.groups},
    }
    ConjugateGradient.solution = solution
    pre.close()
    reducer.close()
    return found


def test_two_ranks_equal_one_process_and_only_the_owner_solves(faults: Faults) -> None:
    torch.set_num_threads(1)
    faults.at(result=EACH).late(3)
    serial = train(Communicator(None), FixedLag(0), 6)
    ranks = run_ranks(2, train, FixedLag(0), 6)
    for of_rank in ranks:
        for own, expected in zip(of_rank["parameters"], serial["parameters"], strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-10)
        assert of_rank["coverage"] == serial["coverage"]
        assert (of_rank["failures"], of_rank["versions"]) == ({}, serial["versions"])
    solver = ranks[0]["couriers"]["head"]
    assert [of_rank["solved"] for of_rank in ranks] == [6 * (rank == solver) for rank in range(2)]
    assert serial["coverage"]["fc"] == ("b-kfac", "Brand on A and G")
    # Each inversion counts once, also the head's, which every rank makes for itself.
    done = {name: sum(of_rank["by_method"].get(name, 0) for of_rank in ranks) for name in serial["by_method"]}
    assert done == serial["by_method"] and set(done) == {"rs-kfac", "b-kfac", "cg-fac"}


def test_as_soon_as_possible_ranks_stay_equal(faults: Faults) -> None:
    faults.at(result=EACH).late(3)
    first, second = run_ranks(2, train, "asap", 16)
    assert all(map(torch.equal, first["parameters"], second["parameters"]))
    assert first["versions"] == second["versions"]
    assert min(first["versions"].values()) > 0
    assert first["failures"] == {}
