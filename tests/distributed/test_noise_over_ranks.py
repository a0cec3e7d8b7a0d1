"""The gradient noise scale over ranks is what one process finds in the same micro-batches, with either reduction."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kfdist.comm.communicator import Communicator
from kfdist.comm.reduce import GradientReducer
from tests.support.preconditioning import preconditioner, rows, two_layers
from tests.support.ranks import run_ranks

STEPS, EXAMPLES, PARTS = 3, 24, 2
"""Micro-batches of a rank; one process takes those of both."""


def noise_scale(communicator: Communicator, how: str, method: str) -> list[float | None]:
    """After each step."""
    net = two_layers()
    model = DistributedDataParallel(net) if how == "ddp" else net
    reducer = GradientReducer(list(net.parameters()), communicator)
    reducer.no_overlap()
    optimizer, found = torch.optim.SGD(net.parameters(), lr=0.1), []
    with preconditioner(model, method) as pre:
        for step in range(STEPS):
            x, y = rows(EXAMPLES, seed=step)
            parts = PARTS * 2 // communicator.world_size
            own = slice(communicator.rank * parts, (communicator.rank + 1) * parts)
            pairs = list(zip(x.chunk(2 * PARTS), y.chunk(2 * PARTS), strict=True))[own]
            optimizer.zero_grad()
            for index, (xs, ys) in enumerate(pairs):
                if isinstance(model, DistributedDataParallel):
                    model.require_backward_grad_sync = index == parts - 1  # what no_sync() sets
                (nn.functional.cross_entropy(model(xs), ys) / parts).backward()
            if how == "reducer":
                reducer.reduce()
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            pre.step()
            optimizer.step()
            found.append(pre.noise_scale())
    return found


@pytest.mark.parametrize("method", ["kfac", "none"])
def test_ranks_equal_one_process(method: str):
    expected = noise_scale(Communicator(None), "alone", method)
    assert all(expected)
    for how in ("reducer", "ddp"):
        for of_rank in run_ranks(2, noise_scale, how, method):
            assert of_rank == pytest.approx(expected, rel=1e-9)
