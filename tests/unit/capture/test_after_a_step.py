"""What was captured of a forward goes with its graph, also while nobody collects garbage."""

import gc

import pytest
import torch
from torch import nn

from kfdist.capture.capture import Capture
from kfdist.capture.requests import Request, Sampling
from kfdist.capture.uses import Use
from kfdist.curvature.blocks import UnitBlock
from tests.support.plans import planned


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.InstanceNorm2d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm([4, 6, 6]),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_no_activation_is_left(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3))
    blocks = {block.name: block for block in planned(model, "kfac").blocks}
    capture = Capture(model, blocks, sampling=Sampling(), grad_scaler=None)
    sums = {name: frozenset({"F"} if isinstance(block, UnitBlock) else {"A", "G"}) for name, block in blocks.items()}
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            capture.arm({name: Request(sums=asked_for) for name, asked_for in sums.items()})
            model(torch.randn(5, 3, 8, 8)).flatten(1).square().sum(1).mean().backward()
            assert set(capture.drain()) == set(blocks) == {"0", "1", "3"}
        assert not [each.name for each in gc.get_objects() if type(each) is Use]
    finally:
        gc.enable()
        capture.close()
