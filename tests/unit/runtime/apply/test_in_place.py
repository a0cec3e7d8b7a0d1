"""On the host large directions are made in the memory of their gradients, and are as if they were made elsewhere."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfdist
from kfdist.curvature import inverse
from kfdist.runtime.apply import in_place

EXACT = 1e-9
"""float64: the same sums in another order, a few steps long."""


def model() -> nn.Module:
    """Blocks with a bias and without, whose gradients are the block's matrix, and are not."""
    torch.manual_seed(0)
    convolutions = nn.Conv2d(4, 8, 3, bias=False), nn.ReLU(), nn.ConvTranspose2d(8, 9, 2)
    net = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(9 * 16, 12), nn.Tanh(), nn.Linear(12, 11, bias=False))
    return net.double().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  gradients follow


def trained(monkeypatch: pytest.MonkeyPatch, *, large: int, moved: bool, **given: Any) -> tuple[nn.Module, set[str]]:
    """Trains a few steps; returns the blocks, too, whose directions were made in place."""
    found: set[str] = set()
    net, written = model(), in_place.InPlace.write_scaled

    def noted(self: in_place.InPlace, scale: Tensor | None, into: object) -> None:
        found.add(self.block.name)
        written(self, scale, into)

    monkeypatch.setattr(inverse, "_LARGE", large)
    monkeypatch.setattr(in_place.InPlace, "write_scaled", noted)
    x = torch.randn(16, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    method = kfdist.RsKfac(rank=3, oversampling=2, direction_error=0)
    timing: dict[str, Any] = {"factor_period": 1, "inverse_period": 2, "adoption": kfdist.FixedLag(0)}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with kfdist.Preconditioner(net, method, lr=0.01, **timing, **given) as pre:
        for _ in range(4):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            if moved:
                for parameter in net.parameters():
                    assert parameter.grad is not None
                    room = torch.empty(parameter.numel() + 1, dtype=torch.float64)
                    parameter.grad = room[1:].view_as(parameter).copy_(parameter.grad)
            pre.step()
            optimizer.step()
    monkeypatch.undo()
    return net, found


@pytest.mark.parametrize("moved", [False, True], ids=["aligned", "as in a bucket"])
@pytest.mark.parametrize("given", [{}, {"kl_clip": 1e-5}, {"kl_clip": None}], ids=["default", "clipped", "no clip"])
def test_in_place_gives_what_elsewhere_gives(monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], moved: bool):
    here, found = trained(monkeypatch, large=0, moved=moved, **given)
    elsewhere, none = trained(monkeypatch, large=1 << 60, moved=moved, **given)
    assert (found, none) == ({"0", "2", "4", "6"}, set())
    for one, other in zip(here.parameters(), elsewhere.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)


def test_directions_that_are_asked_for_leave_gradients_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inverse, "_LARGE", 0)
    net = model()
    with kfdist.Preconditioner(net, "rs-kfac", lr=0.01, adoption=kfdist.FixedLag(0)) as pre:
        net(torch.randn(8, 4, 5, 5, dtype=torch.float64)).square().mean().backward()
        before = [each.grad.clone() for each in net.parameters() if each.grad is not None]
        pre.update()
        pre.directions(0.1)
        after = [each.grad for each in net.parameters() if each.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
