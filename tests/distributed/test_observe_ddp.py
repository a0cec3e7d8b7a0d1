"""`observe` under DistributedDataParallel: nothing is reduced and no gradient touched before the loss's backward."""

from typing import Any

import pytest
import torch
import torch.distributed as dist  # noqa: TID251  # a communication hook's annotations are checked
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from kfdist.comm.communicator import Communicator
from tests.support.factors import armed_capture, assert_factors_equal, factors_of
from tests.support.preconditioning import rows, two_layers
from tests.support.ranks import run_ranks

EXACT = 1e-12
"""float64, sums over 16 rows in another order."""

STEPS = 3


def train(communicator: Communicator, fisher: str, observing: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Three steps; says how many buckets were reduced by observing and by training, the statistics and gradients."""
    net = two_layers()
    reduced: list[int] = []

    def counted(
        state: object,
        bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
    ) -> torch.futures.Future[torch.Tensor]:
        reduced.append(bucket.index())
        assert communicator.process_group is not None
        return allreduce_hook(communicator.process_group, bucket)

    model: nn.Module = net
    if communicator.world_size > 1:
        model = DistributedDataParallel(net, **options)
        model.register_comm_hook(None, counted)
    capture = armed_capture(net, fisher=fisher)
    statistics, by_observing = [], 0
    for step in range(STEPS):
        x, y = rows(16, seed=step)
        if communicator.world_size > 1:
            own = slice(8 * communicator.rank, 8 * communicator.rank + 8)
            x, y = x[own], y[own]
        net.zero_grad()
        output = model(x)
        if observing:
            before = len(reduced)
            capture.observe(output, "cross_entropy")
            by_observing += len(reduced) - before
            assert all(parameter.grad is None for parameter in net.parameters())
        nn.functional.cross_entropy(output, y).backward()
        if observing:
            statistics.append(factors_of(capture.drain()))
        with torch.no_grad():
            for parameter in net.parameters():
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
    capture.close()
    return {
        "by observing": by_observing,
        "reduced": len(reduced),
        "statistics": statistics,
        "parameters": [parameter.detach() for parameter in net.parameters()],
    }


OPTIONS: list[dict[str, Any]] = [
    {},
    {"find_unused_parameters": True},
    {"gradient_as_bucket_view": True},
    {"static_graph": True},
]


def all_runs(communicator: Communicator) -> tuple[list[list[dict[str, Any]]], dict[str, Any]]:
    pairs = [[train(communicator, "mc", observing, each) for observing in (False, True)] for each in OPTIONS]
    return pairs, train(communicator, "exact", True, {})


@pytest.fixture(scope="module")
def of_ranks() -> list[Any]:
    return run_ranks(2, all_runs)


@pytest.mark.parametrize("index", range(len(OPTIONS)), ids=[str(each) for each in OPTIONS])
def test_observing_is_invisible_to_ddp(of_ranks: list[Any], index: int):
    for pairs, _ in of_ranks:
        without, observed = pairs[index]
        assert observed["by observing"] == 0
        assert observed["reduced"] == without["reduced"] > 0
        for each, expected in zip(observed["parameters"], without["parameters"], strict=True):
            assert torch.equal(each, expected)


def test_the_mean_over_ranks_is_the_whole_batch_s(of_ranks: list[Any]):
    whole = train(Communicator(None), "exact", True, {})["statistics"]
    for step, expected in enumerate(whole):
        first, second = (exact["statistics"][step] for _, exact in of_ranks)
        mean = {
            name: ((first[name][0] + second[name][0]) / 2, (first[name][1] + second[name][1]) / 2) for name in first
        }
        assert_factors_equal(mean, expected, 1e-9 if step else EXACT)  # later steps train on rounded parameters
