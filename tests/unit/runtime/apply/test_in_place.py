"""On the host large directions are made in the memory of their gradients, and are as if they were made elsewhere."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfdist
from kfdist.curvature import inverse
from kfdist.curvature.blocks import Block
from kfdist.runtime.apply import in_place
from kfdist.runtime.apply.applications import Applying

EXACT = 1e-9
"""float64: the same sums in another order, a few steps long."""


def model() -> nn.Module:
    """Blocks with a bias and without, whose gradients are the block's matrix, and are not."""
    torch.manual_seed(0)
    convolutions = nn.Conv2d(4, 8, 3, bias=False), nn.ReLU(), nn.ConvTranspose2d(8, 9, 2)
    net = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(9 * 16, 12), nn.Tanh(), nn.Linear(12, 11, bias=False))
    return net.double().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  gradients follow


def sharing() -> nn.Module:
    """Two layers that have one bias, and one that has its own."""
    torch.manual_seed(0)
    first, second = nn.Linear(20, 30), nn.Linear(30, 30)
    second.bias = first.bias
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(30, 40)).double()


def batch(*shape: int) -> Tensor:
    return torch.randn(16, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def low_rank() -> kfdist.RsKfac:
    return kfdist.RsKfac(rank=3, oversampling=2, direction_error=0)


def noted(monkeypatch: pytest.MonkeyPatch, *, large: int) -> set[str]:
    """Has `large` numbers be many; returns where the blocks will be whose directions are made in place."""
    found: set[str] = set()
    written = in_place.InPlace.write_scaled

    def write_scaled(self: in_place.InPlace, scale: Tensor | None, into: object) -> None:
        found.add(self.block.name)
        written(self, scale, into)

    monkeypatch.setattr(inverse, "_LARGE", large)
    monkeypatch.setattr(in_place.InPlace, "write_scaled", write_scaled)
    return found


def trained(
    monkeypatch: pytest.MonkeyPatch, net: nn.Module, x: Tensor, *, large: int, moved: bool = False, **given: Any
) -> set[str]:
    """Trains a few steps; returns the blocks whose directions were made in place."""
    found = noted(monkeypatch, large=large)
    timing: dict[str, Any] = {"factor_period": 1, "inverse_period": 2, "adoption": kfdist.FixedLag(0)}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with kfdist.Preconditioner(net, low_rank(), lr=0.01, **timing, **given) as pre:
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
    return found


CLIPS = pytest.mark.parametrize(
    "given", [{}, {"kl_clip": 1e-5}, {"kl_clip": None}], ids=["default", "clipped", "no clip"]
)


@pytest.mark.parametrize("moved", [False, True], ids=["aligned", "as in a bucket"])
@CLIPS
def test_in_place_gives_what_elsewhere_gives(monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], moved: bool):
    here, elsewhere, x = model(), model(), batch(4, 5, 5)
    assert trained(monkeypatch, here, x, large=0, moved=moved, **given) == {"0", "2", "4", "6"}
    assert trained(monkeypatch, elsewhere, x, large=1 << 60, moved=moved, **given) == set()
    for one, other in zip(here.parameters(), elsewhere.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("large", [0, 800], ids=["both are large", "the later is"])
@CLIPS
def test_blocks_that_share_a_parameter_give_what_elsewhere_gives(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], large: int
):
    here, elsewhere = sharing(), sharing()
    found = trained(monkeypatch, here, batch(20), large=large, **given)
    assert trained(monkeypatch, elsewhere, batch(20), large=1 << 60, **given) == set()
    for one, other in zip(here.parameters(), elsewhere.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)
    assert found == {"4"}, "and the one that shares nothing still goes in place"


def gradients(net: nn.Module) -> list[Tensor]:
    return [each.grad.clone() for each in net.parameters() if each.grad is not None]


def test_directions_that_are_asked_for_leave_gradients_alone(monkeypatch: pytest.MonkeyPatch):
    found, net = noted(monkeypatch, large=0), model()
    with kfdist.Preconditioner(net, low_rank(), lr=0.01, adoption=kfdist.FixedLag(0)) as pre:
        net(batch(4, 5, 5)).square().mean().backward()
        before = gradients(net)
        pre.update()
        pre.directions(0.1)
        assert not found and all(map(torch.equal, before, gradients(net)))
        pre.step()
        assert found == {"0", "2", "4", "6"} and not any(map(torch.equal, before, gradients(net)))


@pytest.mark.parametrize("graft", [None, "sgd"])
def test_an_optimizers_steps_leave_gradients_alone(monkeypatch: pytest.MonkeyPatch, graft: Any):
    found, net, calls = noted(monkeypatch, large=0), model(), []
    apply: Any = Applying.apply

    def watched(*arguments: Any) -> None:
        calls.append(arguments)
        apply(*arguments)

    monkeypatch.setattr(Applying, "apply", watched)
    with kfdist.Preconditioner(net, low_rank(), lr=0.01, kl_clip=None, adoption=kfdist.FixedLag(0)) as pre:
        optimizer = kfdist.Optimizer(pre, lr=0.01, graft=graft)
        net(batch(4, 5, 5)).square().mean().backward()
        before = gradients(net)
        optimizer.step()
        assert not found and all(map(torch.equal, before, gradients(net)))
        *arguments, table = calls.pop()
        assert table is not None
        apply(*arguments, None)
        assert found == {"0", "2", "4", "6"}, "without the table they would go in place"


@pytest.mark.parametrize(
    "method",
    ["kfac", kfdist.RsKfac(rank=100), kfdist.RsKfac(rank=3, direction_error=0, damping_rule="common"), low_rank()],
    ids=["kfac", "matrices", "common damping", "in place"],
)
def test_gradients_are_made_into_matrices_once(monkeypatch: pytest.MonkeyPatch, method: str | kfdist.RsKfac):
    """It may copy them: half precision, buckets, layouts."""
    monkeypatch.setattr(inverse, "_LARGE", 0)
    made: Counter[str] = Counter()
    for name in ("gradient", "gradient_apart"):
        original = getattr(Block, name)

        def counted(self: Block, original: Any = original, **given: Any) -> Any:
            made[self.name] += 1
            return original(self, **given)

        monkeypatch.setattr(Block, name, counted)
    net = model()
    with kfdist.Preconditioner(net, method, lr=0.01, adoption=kfdist.FixedLag(0)) as pre:
        net(batch(4, 5, 5)).square().mean().backward()
        pre.step()
    assert made == dict.fromkeys(("0", "2", "4", "6"), 1)
