"""What isn't public of torch.distributed still exists and does what is assumed of it."""

from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kfdist.comm.communicator import Communicator
from kfdist.torch_internals import group_count, group_timeout, without_first_reduction
from tests.support.ranks import run_ranks


def groups(communicator: Communicator) -> None:
    whole = communicator.process_group
    assert whole is not None
    before = group_count()
    timeout = timedelta(seconds=17)
    further = dist.new_group([communicator.rank], timeout=timeout, use_local_synchronization=True)
    assert isinstance(further, dist.ProcessGroup)
    assert group_count() == before + 1
    assert group_timeout(further, torch.device("cpu")) == timeout
    assert group_timeout(whole, torch.device("cpu")) == timedelta(seconds=60), "as tests.support.ranks joined it"
    dist.destroy_process_group(further)
    assert group_count() == before


def gradients_of_two_backwards(communicator: Communicator, *, static: bool, guarded: bool) -> list[float]:
    """A first backward for its own sake, then that of the loss, each rank with another example."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(2, 1, bias=False), static_graph=static)
    output = model(torch.full((1, 2), float(communicator.rank)))[:, :]
    with without_first_reduction(output) if guarded else nullcontext():
        torch.autograd.grad(output.sum(), list(model.parameters()), retain_graph=True)
    output.sum().backward()
    (weight,) = model.parameters()
    assert weight.grad is not None
    return weight.grad.flatten().tolist()


def reductions(communicator: Communicator) -> list[list[float]]:
    cases = [(False, False), (False, True), (True, True), (True, False)]
    return [gradients_of_two_backwards(communicator, static=static, guarded=guarded) for static, guarded in cases]


def test_groups_have_a_timeout_and_are_counted():
    run_ranks(2, groups)


def test_a_static_graphs_reduction_waits_for_the_losss_backward():
    for rank, (*reduced, unguarded) in enumerate(run_ranks(2, reductions)):
        assert reduced == [[0.5, 0.5]] * 3
        assert unguarded == [rank, rank], "torch needs no guard any more: remove it"
