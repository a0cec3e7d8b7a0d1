"""A first batch that can't be used (the overflow that starts most runs under AMP) doesn't cost an inverse period."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kfdist
from tests.support.captured_methods import CAPTURED


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def backward(net: nn.Module, step: int, spoiled: range) -> None:
    net.zero_grad()
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (8,), generator=generator)
    F.cross_entropy(net(x * float("nan") if step in spoiled else x), y).backward()


def make(net: nn.Module, method: str) -> kfdist.Preconditioner:
    settings: dict[str, Any] = {"adoption": kfdist.FixedLag(0), "kl_clip": None, "factor_period": 10}
    return kfdist.Preconditioner(net, method, damping=0.1, inverse_period=100, **settings)


def untouched(net: nn.Module, pre: kfdist.Preconditioner) -> bool:
    before = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    pre.step()
    after = [p.grad for p in net.parameters() if p.grad is not None]
    return any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("spoiled", [range(1), range(3)])
@pytest.mark.parametrize("method", CAPTURED)
def test_a_block_without_statistics_is_due_again_soon(method: str, spoiled: range):
    net = model()
    with make(net, method) as pre:
        plain = []
        for step in range(8):
            backward(net, step, spoiled)
            plain.append(untouched(net, pre))
        # What the ranks make themselves is looked at one step late, and due every other step.
        assert plain[len(spoiled) + 2 :] == [False] * (6 - len(spoiled)), plain
        assert pre.counters()["fallbacks"]["no_snapshot"] == 2 * (len(spoiled) + sum(plain[len(spoiled) :]))
        assert all(version <= len(spoiled) + 1 for version in pre.versions().values())


@pytest.mark.parametrize("saved", [1, 2, 3])
@pytest.mark.parametrize("method", ["eva", "cg-fac", "kfac", "b-kfac"])
def test_a_resumed_run_waits_as_long(method: str, saved: int):
    whole, parts = model(), model()
    state: dict[str, Any] = {}
    versions: dict[str, int] = {}
    with make(whole, method) as pre:
        for step in range(7):
            backward(whole, step, range(2))
            if step == saved:
                state = copy.deepcopy(pre.state_dict())
            pre.step()
    with make(parts, method) as pre:
        pre.load_state_dict(state)
        for step in range(saved, 7):
            backward(parts, step, range(2))
            pre.step()
            versions = pre.versions()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.equal(a.grad, b.grad)
    assert set(versions.values()) <= {2, 3, 4}


class Staged(nn.Module):
    """Its second layer may come into use later."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 3), nn.Linear(3, 3)
        self.both = False
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) if self.both else self.first(x)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_block_that_stays_without_statistics_is_due_when_it_folds_alone(frozen: bool):
    """Else a head that nothing uses, or a frozen layer, would have every step measured."""
    net, due = Staged(), []
    with make(net, "kfac") as pre:
        net.both = frozen
        net.second.requires_grad_(not frozen)
        for step in range(60):
            if "second" in pre.pipeline.timetable.requests(step, calibrating=()):
                due.append(step)
            backward(net, step, range(0))
            pre.step()
        assert due[:9] == list(range(9)) and len(due) >= 14
        assert {later - step for step, later in zip(due[9:], due[10:], strict=False)} == {10}
        net.both = True
        net.second.requires_grad_(True)
        for step in range(60, 71):
            backward(net, step, range(0))
            pre.step()
        assert 60 <= pre.versions()["second"] < 71
