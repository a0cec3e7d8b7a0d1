"""What one rank gets wrong at the start is told on all ranks, and none of them waits for the others."""

from typing import Any

import pytest
import torch
from torch import nn

import kfdist
from kfdist.comm.communicator import Communicator
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.links.link import LinkContext
from kfdist.links.local import LocalLink
from kfdist.policies.staleness import StalenessPolicy
from tests.support.ranks import run_ranks
from tests.support.small_models import images, small_cnn

DIFFERENT: dict[str, tuple[Any, Any]] = {
    "damping": (0.1, 0.2),
    "ema_decay": (0.9, 0.95),
    "factor_period": (1, 2),
    "inverse_period": (4, 8),
    "kl_clip": (1e-3, None),
    "adoption": (kfdist.FixedLag(1), kfdist.FixedLag(2)),
    "staleness": (StalenessPolicy(soft_bound=20), StalenessPolicy(hard_bound=20)),
    "seed": (1, 2),
    "digest_period": (0, 100),
    "fisher": ("empirical", "mc"),
    "weight_sharing": ("expand", "reduce"),
    "examples_fraction": (1.0, 0.5),
    "positions_fraction": (1.0, 0.5),
    "positions_budget": (None, 7),
    "method": ("kfac", "kfac-eigen"),
}


def first_steps(communicator: Communicator) -> dict[str, str]:
    """Gives the ranks different values of one argument at a time; returns what the first step said of each."""
    messages = {}
    for name, values in DIFFERENT.items():
        model = small_cnn()
        arguments = {"method": "kfac", "factor_period": 1, "inverse_period": 4, "damping": 0.1, "lr": 0.1}
        pre = kfdist.Preconditioner(model, **{**arguments, name: values[communicator.rank]})
        x, y = images(4)
        output = model(x)
        pre.observe(output)
        nn.functional.cross_entropy(output, y).backward()
        with pytest.raises(ConfigError) as raised:
            pre.step()
        messages[name] = str(raised.value)
        pre.abandon()
    return messages


def test_ranks_with_different_arguments_are_told_which() -> None:
    for messages in run_ranks(2, first_steps):
        for name, (first, second) in DIFFERENT.items():
            assert f"the ranks were given different {name}" in messages[name]
            assert f"rank 0: {_shown(first)}" in messages[name]
            assert f"; rank 1: {_shown(second)}" in messages[name]


def _shown(value: object) -> str:
    """How an argument stands in a message; of methods it is the inverter of each block."""
    if value in DIFFERENT["method"]:
        return ""
    return f"FixedLag({value.lag})" if isinstance(value, kfdist.FixedLag) else str(value)


class UnstartableLink(LocalLink):
    """Can't start on one rank."""

    def __init__(self, broken: bool) -> None:
        super().__init__()
        self._broken = broken

    def start(self, context: LinkContext) -> None:
        if self._broken:
            raise OSError("no process to be had")
        super().start(context)


def construct(communicator: Communicator) -> tuple[str, int]:
    """Returns what construction raised, and how many hooks it left on the model."""
    model = small_cnn()
    link = UnstartableLink(broken=communicator.rank == 1)
    try:
        kfdist.Preconditioner(model, "kfac", lr=0.1, link=link)
    except EnvironmentFault as error:
        left = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
        with kfdist.Preconditioner(model, "kfac", lr=0.1) as pre:  # the ranks can still talk to each other
            torch.nn.functional.cross_entropy(model(images(4)[0]), images(4)[1]).backward()
            pre.step()
        return str(error), left
    raise AssertionError("a preconditioner was made without its link")


def test_a_link_that_starts_on_one_rank_alone_is_undone_on_all() -> None:
    for message, hooks_left in run_ranks(2, construct):
        assert "rank 1: no process to be had" in message and "rank 0" not in message
        assert hooks_left == 0
