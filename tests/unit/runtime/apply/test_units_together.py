"""Blocks of units of one shape are solved and written together, and are as if each were by itself."""

from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import kfdist
from kfdist.runtime.apply import directions
from kfdist.runtime.apply.applications import Applying
from tests.support.kernel_launches import Launches

WIDTH, STEPS = 6, 4
EXACT = 1e-9
"""float64: the same sums in another order, `STEPS` steps long."""

FROZEN, UNSEEN = 4, 5
"""Places of a norm whose shift is frozen after two steps, and of one in eval mode, of which nothing is measured."""


def model(norms: int = 2) -> nn.Sequential:
    """Units of one number and of two, of one width and of another, alone and with others."""
    torch.manual_seed(0)
    two = [nn.LayerNorm(WIDTH) for _ in range(norms)]
    others = [nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.BatchNorm1d(WIDTH), nn.PReLU(WIDTH)]
    last = [nn.LayerNorm(WIDTH, bias=False), nn.Linear(WIDTH, 4), nn.LayerNorm(4), nn.PReLU()]
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *two, *others, *last).double()


def trained(net: nn.Sequential, monkeypatch: pytest.MonkeyPatch, *, alone: bool, **given: Any) -> Counter[str]:
    """Trains a few steps; returns what the last one's application launched."""
    if alone:
        monkeypatch.setattr(directions, "fit", lambda *_: False)
    counted, apply = Launches(), Applying.apply

    def watched(*arguments: Any) -> None:
        counted.by_name.clear()
        with counted:
            apply(*arguments)

    timing: dict[str, Any] = {"factor_period": 1, "inverse_period": 3, "adoption": kfdist.FixedLag(0)}
    given = timing | given
    grafted = given.pop("grafted", False)
    with mock.patch.object(Applying, "apply", watched), kfdist.Preconditioner(net, "kfac", **given) as pre:
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.01)
        if grafted:
            optimizer = kfdist.Optimizer(pre, lr=0.01, graft=None)
        for step in range(STEPS):
            if step == 2:
                net[FROZEN].bias.requires_grad_(False)
            optimizer.zero_grad()
            x = torch.randn(16, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            net(x).square().mean().backward()
            if not grafted:
                pre.step()
            optimizer.step()
    monkeypatch.undo()
    return counted.by_name


@pytest.mark.filterwarnings("ignore::kfdist.errors.KfdistWarning")  # of the one in eval mode
@pytest.mark.parametrize(
    "given",
    [{"lr": 0.01}, {"lr": 0.01, "kl_clip": 1e-5}, {"kl_clip": None}, {"lr": 0.01, "grafted": True}],
    ids=["default", "clipped", "no clip", "into a table"],
)
def test_together_gives_what_each_by_itself_gives(monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]):
    together, apart, before = model(), model(), model()
    for net in (together, apart):
        net[UNSEEN].eval()
    fewer = trained(together, monkeypatch, alone=False, **given)
    more = trained(apart, monkeypatch, alone=True, **given)
    assert fewer.total() < more.total()
    for one, other, begun in zip(together.parameters(), apart.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)
        assert not torch.equal(one, begun)


def gradients(net: nn.Module) -> list[Tensor]:
    return [each.grad.clone() for each in net.parameters() if each.grad is not None]


def test_more_blocks_of_one_shape_launch_nothing_more(monkeypatch: pytest.MonkeyPatch):
    few, many = (trained(model(norms), monkeypatch, alone=False, lr=0.01, inverse_period=100) for norms in (2, 4))
    assert few == many


def test_directions_that_are_asked_for_leave_gradients_alone():
    net = model()
    x = torch.randn(16, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with kfdist.Preconditioner(net, "kfac", lr=0.01, kl_clip=None, adoption=kfdist.FixedLag(0)) as pre:
        net(x).square().mean().backward()
        before = gradients(net)
        pre.update()
        found = pre.directions(pre.settings.damping_at(0))
        assert all(map(torch.equal, before, gradients(net)))
        net.zero_grad()
        net(x).square().mean().backward()
        pre.step()
    for parameter in net.parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[parameter], parameter.grad, rtol=EXACT, atol=EXACT)
