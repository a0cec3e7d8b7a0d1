"""Generators and buffers are held, put back and saved; buffers of several ranks merge."""

import torch
from torch import Tensor, nn

from kfdist.runtime.forward_state import ForwardState

CPU = torch.device("cpu")


class Replacing(nn.Module):
    """Has a persistent and a temporary buffer; a forward puts new tensors in their places."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean + torch.rand(2)
        self.calls = self.calls + 1
        self.scratch = self.scratch + 1
        return x + self.mean


def model() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(2), Replacing())


def buffers(network: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


def test_a_forward_is_undone():
    network = model()
    originals = dict(network.named_buffers())
    before = buffers(network)
    state = ForwardState(network, CPU)
    first = network(torch.ones(4, 2))
    assert all(not torch.equal(before[name], buffer) for name, buffer in buffers(network).items())
    state.restore()
    assert all(torch.equal(before[name], buffer) for name, buffer in buffers(network).items())
    assert all(buffer is originals[name] for name, buffer in network.named_buffers())
    assert torch.equal(network(torch.ones(4, 2)), first), "the same numbers are drawn"


def test_what_was_saved_is_a_copy_and_comes_back():
    network = model()
    state = ForwardState(network, CPU)
    network(torch.ones(4, 2))
    state.remember()
    saved, after = state.state_dict(), buffers(network)
    assert set(saved["buffers"]) == set(after) - {"1.scratch"}
    draws = torch.rand(3)
    network(torch.ones(4, 2))
    state.remember()

    other = model()
    restored = ForwardState(other, CPU)
    restored.load_buffers([saved])
    restored.load_random(saved)
    assert all(torch.equal(buffer, after[name]) for name, buffer in buffers(other).items() if name != "1.scratch")
    assert torch.equal(torch.rand(3), draws)
    restored.restore()
    assert torch.equal(torch.rand(3), draws)


def test_buffers_of_several_ranks_take_the_mean_and_counters_the_first():
    network = model()
    states = []
    for value in (1, 3):
        network[1].mean.fill_(value)
        network[1].calls.fill_(value)
        states.append(ForwardState(network, CPU).state_dict())
    ForwardState(network, CPU).load_buffers(states)
    assert network[1].mean.tolist() == [2.0, 2.0]
    assert network[1].calls.item() == 1
