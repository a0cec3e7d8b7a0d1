"""Copies to the host through pinned memory, and a training group of one rank: NCCL on CUDA, gloo on a CPU."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn

import kfdist
from kfdist.comm.background import Header, PayloadBroadcast, TableExchange
from kfdist.comm.communicator import Communicator, join_training_group
from kfdist.comm.host_copy import HostCopy, LateTotal
from kfdist.comm.reduce import GradientReducer, reduce_flat
from kfdist.linalg.uploads import sent
from kfdist.types import JobResult
from tests.support.on_devices import Trained

Busy = Callable[[], Callable[[], bool]]


@pytest.mark.parametrize("aside", [False, True])
def test_a_copy_is_that_of_the_moment_and_doesnt_wait(device: torch.device, keep_busy: Busy, aside: bool):
    source, resident = torch.zeros(1 << 20, device=device), torch.ones(2)
    source += 1  # once before: CUDA loads a kernel at its first use, and waits for the device to do so
    HostCopy([source, resident], aside=aside).wait()
    source -= 1
    busy = keep_busy()
    source += 1
    copy = HostCopy([source, resident], aside=aside)
    if device.type == "cuda":
        assert busy() and not copy.ready(), "making the copy waited for the device"
        if not aside:
            source += 1
    arrived, same = copy.wait()
    assert copy.ready() and arrived.device.type == "cpu" and same is resident
    assert arrived.is_pinned() == (device.type == "cuda")
    assert bool((arrived == 1).all())


def test_what_the_host_sends_is_of_the_moment_and_doesnt_wait(device: torch.device, keep_busy: Busy):
    """A mebibyte of pageable memory, for which `to(device, non_blocking=True)` waits."""
    numbers = torch.arange(1 << 18, dtype=torch.float32)
    sent(numbers, device)  # has torch pin memory, which it keeps
    torch.zeros((), device=device).item()
    busy = keep_busy()
    there = sent(numbers, device)
    if device.type == "cuda":
        assert busy(), "the host waited for the device"
        numbers.zero_()
    assert there.device.type == device.type and torch.equal(there.cpu(), torch.arange(1 << 18, dtype=torch.float32))


def test_a_total_of_the_device_comes_late(device: torch.device, keep_busy: Busy):
    total, count = LateTotal(), torch.tensor(3, device=device)
    LateTotal().latest([count + 1])  # loads the kernels
    keep_busy()
    assert total.latest([count]) == (0.0 if device.type == "cuda" else 3.0)
    (count + 0).item()
    keep_busy()
    assert total.latest([count + 1]) == (3.0 if device.type == "cuda" else 4.0)


@pytest.fixture
def world(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[Communicator]:
    """A group of one rank, joined as ranks join."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in {**variables, "NCCL_SOCKET_IFNAME": "lo"}.items():  # as GLOO_SOCKET_IFNAME of all tests
        monkeypatch.setenv(name, value)
    joined = join_training_group(timeout_seconds=60, device=device.type)
    yield joined
    joined.close()


def test_collectives(world: Communicator, device: torch.device):
    assert world.device.type == device.type
    numbers = torch.arange(5, dtype=torch.float32, device=device)
    assert reduce_flat([numbers, numbers + 1], world)[1].tolist() == [1, 2, 3, 4, 5]
    assert world.all_gather_json({"a": [1, "ü"]}) == [{"a": [1, "ü"]}]
    assert [each.tolist() for each in world.all_gather(numbers)] == [[0, 1, 2, 3, 4]]
    world.broadcast_tensors_([numbers])
    tables = TableExchange(world)
    assert tables.agree([3, 1]) == [3, 1] and tables.share([0.5]) == [0.5]


def test_tables_and_payloads_travel_without_a_wait(
    world: Communicator, device: torch.device, without_waiting: Callable[[], AbstractContextManager[None]]
):
    payload = os.urandom(1 << 16)
    header = Header.of(JobResult(group="a", version=3, payload=payload, seconds=0.1, owner="owner-0"))
    tables, digest = TableExchange(world), torch.tensor(77, device=device)
    tables.agree([0])  # NCCL connects the ranks at the first collective, and may wait
    with without_waiting():
        tables.start([5, 6, 0, 0], digest)
        travelling = PayloadBroadcast(world, header, source=0, payload=payload)
    assert tables.complete() == [5, 6, 77, ~77]
    assert travelling.receive() and travelling.payload == payload and travelling.is_completed()


def test_training_in_the_group_is_training_alone(world: Communicator, device: torch.device):
    """Through all of the group's own streams: gradients, statistics, tables and snapshots."""
    found = []
    for group in (world.process_group, None):
        trained = Trained(device, adoption=kfdist.FixedLag(1), process_group=group)
        reducer = GradientReducer(list(trained.model.parameters()), Communicator(group))
        with trained.pre:
            for seed in range(5):
                trained.forward_and_backward(seed)
                reducer.reduce()
                trained.pre.step()
                trained.optimizer.step()
        reducer.close()
        found.append(trained.parameters())
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_ddp_on_the_device(world: Communicator, device: torch.device):
    trained = Trained(device, adoption=kfdist.FixedLag(1))
    trained.pre.close()
    ddp = nn.parallel.DistributedDataParallel(trained.model)
    x, y = trained.resident(0)
    with kfdist.Preconditioner(ddp, "rs-kfac", lr=0.1, inverse_period=2, factor_period=1) as pre, torch.enable_grad():
        for _ in range(4):
            trained.optimizer.zero_grad()
            nn.functional.cross_entropy(ddp(x), y).backward()
            pre.step()
            trained.optimizer.step()
        assert pre.coverage().share > 0.99
    assert bool(trained.parameters().isfinite().all())
