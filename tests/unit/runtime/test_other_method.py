"""A state is loaded into the methods that it was written with, and into no others."""

import pytest
import torch
from torch import nn

import kfdist
from kfdist.errors import CheckpointError


def make(method: str) -> kfdist.Preconditioner:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2))
    return kfdist.Preconditioner(net, method, kl_clip=None, adoption=kfdist.FixedLag(0))


@pytest.mark.parametrize(("written", "loaded"), [("seng", "cg-fac"), ("rs-kfac", "b-kfac"), ("kfac", "ekfac")])
def test_another_method_is_refused_although_it_sums_the_same(written: str, loaded: str):
    with make(written) as pre:
        state = pre.state_dict()
    with make(loaded) as pre, pytest.raises(CheckpointError, match=f"'{written}' in the checkpoint and has '{loaded}'"):
        pre.load_state_dict(state)
    with make(written) as pre:
        pre.load_state_dict(state)
