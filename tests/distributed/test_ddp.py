"""DistributedDataParallel around the model: clean names, the same statistics and directions; sharded models refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import kfdist
from kfdist.comm.communicator import Communicator
from kfdist.errors import ConfigError
from tests.support.factors import assert_factors_equal
from tests.support.plans import planned
from tests.support.preconditioning import factors, preconditioner, rows, two_layers
from tests.support.ranks import run_ranks

EXACT = 1e-10
"""float64; ranks add in another order than one process, which inverses at a damping of 0.1 amplify by 1e4 at most."""

STEPS, MICRO_BATCHES = 3, 2


def result(model: nn.Module, pre: kfdist.Preconditioner) -> dict[str, Any]:
    pre.fold()
    return {
        "factors": factors(pre),
        "coverage": pre.coverage(),
        "parameters": [parameter.detach() for parameter in model.parameters()],
    }


def train(communicator: Communicator, wrap: bool, accumulate: bool) -> dict[str, Any]:
    """On this rank's part of the batch, or on all of it; accumulating, only the last micro-batch synchronises."""
    net = two_layers()
    model = DistributedDataParallel(net) if wrap else net
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with preconditioner(model, lr=None).attach(optimizer) as pre:
        for step in range(STEPS):
            x, y = rows(16, seed=step)
            if communicator.world_size > 1:
                own = slice(8 * communicator.rank, 8 * communicator.rank + 8)
                x, y = x[own], y[own]
            optimizer.zero_grad()
            parts = MICRO_BATCHES if accumulate else 1
            for index, (xs, ys) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
                if isinstance(model, DistributedDataParallel):
                    model.require_backward_grad_sync = index == parts - 1  # what no_sync() sets
                (nn.functional.cross_entropy(model(xs), ys) / parts).backward()
            optimizer.step()
        return result(net, pre)


@pytest.mark.parametrize("accumulate", [False, True], ids=["", "no_sync"])
def test_ddp_equals_one_process_on_the_whole_batch(accumulate: bool):
    expected = train(Communicator(None), False, False)
    for of_rank in run_ranks(2, train, True, accumulate):
        assert_factors_equal(of_rank["factors"], expected["factors"], EXACT)
        assert of_rank["coverage"] == expected["coverage"]
        for mine, truth in zip(of_rank["parameters"], expected["parameters"], strict=True):
            torch.testing.assert_close(mine, truth, rtol=EXACT, atol=EXACT)


def refusals(communicator: Communicator) -> dict[str, str]:
    """What is said of a DTensor parameter, of FSDP, and of FSDP inside a model."""
    said = {}
    mesh = init_device_mesh("cpu", (communicator.world_size,))
    sharded: Any = two_layers()
    sharded[0].weight = nn.Parameter(distribute_tensor(sharded[0].weight.detach(), mesh, [Replicate()]))
    wrapped = FullyShardedDataParallel(two_layers(), device_id=torch.device("cpu"), use_orig_params=True)
    models = {"dtensor": sharded, "fsdp": wrapped, "fsdp inside": nn.Sequential(wrapped, nn.Linear(3, 3).double())}
    for name, model in models.items():
        try:
            planned(model, "kfac")
        except ConfigError as error:
            said[name] = str(error)
    return said


def test_sharded_models_are_refused_with_a_sentence():
    (said,) = run_ranks(1, refusals)
    assert "layer '0' has sharded (DTensor) parameters" in said["dtensor"]
    assert "FullyShardedDataParallel, which shards" in said["fsdp"]
    assert "FullyShardedDataParallel, which shards" in said["fsdp inside"]
    assert all("use DistributedDataParallel" in each for each in said.values())


def tensors_equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def draws(communicator: Communicator, seed: int) -> list[Tensor]:
    """Sub-sampled statistics of the same batch on every rank: the same draw everywhere."""
    model = two_layers()
    with preconditioner(model, sampling=kfdist.Sampling(examples_fraction=0.25), seed=seed) as pre:
        x, y = rows(16)
        nn.functional.cross_entropy(model(x), y).backward()
        pre.step()
        del communicator
        return [factor for of_block in factors(pre).values() for factor in of_block]


def test_sub_sampling_draws_the_same_on_every_process_for_a_seed():
    first, second = run_ranks(2, draws, 5)
    assert tensors_equal(first, second)
    assert tensors_equal(first, draws(Communicator(None), 5))
    assert not tensors_equal(first, draws(Communicator(None), 6))
