"""On the host the gradients of a block's weight and bias aren't joined; their directions are as if they were."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import kfdist
from kfdist.curvature.blocks import Block
from kfdist.curvature.blocks.base import ALIGNMENT
from kfdist.runtime.apply import directions
from kfdist.runtime.apply.applications import Applying
from tests.support.factors import blocks_of
from tests.support.kernel_launches import Launches

STEPS = 4
EXACT = 1e-9
"""float64: the same sums in another order, `STEPS` steps long."""


def model() -> nn.Module:
    """Blocks of one and of two matrices, all with a bias."""
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 12), nn.ReLU(), nn.Linear(12, 5)
    return nn.Sequential(*layers).double()


def trained(*, rank: int, grafted: bool = False) -> tuple[nn.Module, Launches]:
    """Trains a few steps, the last of which is counted."""
    net, counted, apply = model(), Launches(), Applying.apply

    def watched(*arguments: Any) -> None:
        counted.by_name.clear()
        with counted:
            apply(*arguments)

    x = torch.randn(16, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    method = kfdist.RsKfac(rank=rank, oversampling=2, direction_error=0)
    given: dict[str, Any] = {"factor_period": 1, "inverse_period": 2, "adoption": kfdist.FixedLag(0)}
    with (
        mock.patch.object(Applying, "apply", watched),
        kfdist.Preconditioner(net, method, lr=0.01, **given) as pre,
    ):
        optimizer = (
            kfdist.Optimizer(pre, lr=0.01, graft=None) if grafted else torch.optim.SGD(net.parameters(), lr=0.01)
        )
        for _ in range(STEPS):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            if not grafted:
                pre.step()
            optimizer.step()
    return net, counted


@pytest.mark.parametrize("rank", [3, 100], ids=["low rank", "matrices"])
@pytest.mark.parametrize("grafted", [False, True], ids=["into .grad", "into a table"])
def test_apart_gives_what_joined_gives(rank: int, grafted: bool, monkeypatch: pytest.MonkeyPatch):
    apart, counted = trained(rank=rank, grafted=grafted)
    monkeypatch.setattr(directions, "joined_on", lambda _device: True)
    joined, counted_joined = trained(rank=rank, grafted=grafted)
    for one, other in zip(apart.parameters(), joined.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)
    blocks = 3
    assert counted_joined.by_name["cat"] - counted.by_name["cat"] == blocks, "one copy a block less"


def gradients(offset: int) -> list[tuple[Tensor, Tensor]]:
    """Those of blocks whose parameters' gradients begin so many numbers behind a boundary, as in a bucket."""
    net = model()
    for index, parameter in enumerate(net.parameters()):
        values = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(index))
        room = torch.empty(parameter.numel() + ALIGNMENT, dtype=torch.float64)
        parameter.grad = room[offset : offset + parameter.numel()].view_as(parameter).copy_(values)
    blocks: list[Block] = list(blocks_of(net).values())
    return [block.gradient_apart() for block in blocks]


def test_where_a_gradient_lies_decides_on_nothing():
    for there, elsewhere in zip(gradients(0), gradients(1), strict=True):
        for one, other in zip(there, elsewhere, strict=True):
            assert torch.equal(one, other)
            assert other.is_contiguous()
            assert other.data_ptr() % ALIGNMENT == 0
