"""What one rank gets wrong at the start is told on all ranks, and none of them waits for the others."""

import torch
from torch import nn

import kfdist
from kfdist.comm.communicator import Communicator
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.links.link import LinkContext
from kfdist.links.local import LocalLink
from tests.support.ranks import run_ranks
from tests.support.small_models import images, small_cnn


def first_step(communicator: Communicator, name: str, values: tuple[float, float]) -> str:
    """Gives each rank its own value of one argument; returns what the first step raised."""
    model = small_cnn()
    arguments = {"factor_period": 1, "inverse_period": 4, "damping": 0.1, "lr": 0.1, name: values[communicator.rank]}
    pre = kfdist.Preconditioner(model, "kfac", **arguments)
    x, y = images(4)
    nn.functional.cross_entropy(model(x), y).backward()
    try:
        pre.step()
    except ConfigError as error:
        pre.abandon()
        return str(error)
    raise AssertionError("ranks with different arguments made a step")


def test_ranks_with_different_arguments_are_told_which() -> None:
    for name, values in (("inverse_period", (4, 8)), ("damping", (0.1, 0.2)), ("kl_clip", (1e-3, 1e-2))):
        for message in run_ranks(2, first_step, name, values):
            assert f"different {name}" in message
            assert f"rank 0: {values[0]}; rank 1: {values[1]}" in message


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
