"""Processes that were started to train together and have no group: none of them trains alone."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import kfdist
from kfdist.comm.communicator import join_training_group
from kfdist.errors import ConfigError, EnvironmentFault

MAKERS: dict[str, Callable[..., Any]] = {
    "optimizer": kfdist.Optimizer,
    "preconditioner": lambda model, **options: kfdist.Preconditioner(model, lr=0.1, **options),
    "adaptive step": kfdist.AdaptiveStep.for_model,
}


@pytest.fixture(autouse=True)
def _second_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")


@pytest.mark.parametrize("link", [None, kfdist.connect("127.0.0.1:1", run="mine")], ids=["by itself", "by a service"])
@pytest.mark.parametrize("maker", MAKERS)
def test_one_of_several_processes_without_a_group_is_refused_before_anything_starts(
    maker: str, link: kfdist.Service | None
) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ConfigError) as told:
        MAKERS[maker](model, link=link)
    assert "RANK is 1 and WORLD_SIZE is 4" in str(told.value)
    assert "torch.distributed.init_process_group()" in str(told.value)
    assert "take RANK and WORLD_SIZE out" in str(told.value)


@pytest.mark.parametrize(("missing", "count"), [("RANK", "4"), ("WORLD_SIZE", "4"), ("", "1"), ("", "many")])
def test_a_process_of_which_its_variables_do_not_say_so_trains_alone(
    monkeypatch: pytest.MonkeyPatch, missing: str, count: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", count)
    if missing:
        monkeypatch.delenv(missing)
    with kfdist.Optimizer(nn.Linear(3, 2)) as optimizer:
        assert optimizer.preconditioner.world.world_size == 1


def test_a_rank_of_a_run_that_is_not_told_which_one_it_is_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK")
    with pytest.raises(EnvironmentFault, match=r"WORLD_SIZE is 4 and RANK isn't set.*Start all ranks with torchrun"):
        join_training_group()
    monkeypatch.delenv("WORLD_SIZE")
    assert join_training_group().world_size == 1
