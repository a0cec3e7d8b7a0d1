"""What one rank gets wrong at the start is told on all ranks, and none of them waits for the others."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import kfdist
from kfdist.comm.communicator import Communicator
from kfdist.config import load_config
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.runtime import assembly
from kfdist.training import worker
from tests.support.faults import Faults
from tests.support.faulty.link import FaultyLink
from tests.support.ranks import run_ranks
from tests.support.small_models import images, small_cnn

DIFFERENT: dict[str, tuple[Any, Any]] = {
    "damping": (0.1, 0.2),
    "ema_decay": (0.9, 0.95),
    "factor_period": (1, 2),
    "inverse_period": (4, 8),
    "fisher": ("empirical", "mc"),
    "weight_sharing": ("expand", "reduce"),
    "sampling": (kfdist.Sampling(), kfdist.Sampling(examples_fraction=0.5, positions_fraction=0.5, positions_budget=7)),
    "skip": ((), ("2",)),
    "kl_clip": (1e-3, None),
    "lr": (0.1, None),
    "adoption": (kfdist.FixedLag(1), kfdist.Asap(hard_bound=20)),
    "seed": (1, 2),
    "digest_period": (0, 100),
    "method": ("kfac", "kfac-eigen"),
    "link": (None, FaultyLink()),
    "grad_scaler": (None, torch.amp.GradScaler("cpu")),
}
SHOWN = {
    "method": ("[('0', Kfac(", "[('0', KfacEigen("),
    "link": ("LocalLink", "FaultyLink"),
    "grad_scaler": ("None", "enabled"),
}
"""What stands in the message where it isn't the value."""


def first_step(communicator: Communicator, name: str, value: Any) -> str:
    """Makes a first step with this rank's value of one argument; returns what it raised."""
    model = small_cnn()
    arguments = {"method": "kfac", "factor_period": 1, "inverse_period": 4, "damping": 0.1, "lr": 0.1, name: value}
    pre = kfdist.Preconditioner(model, **arguments)
    x, y = images(4)
    output = model(x)
    pre.observe(output)
    loss = nn.functional.cross_entropy(output, y)
    if pre.grad_scaler is None:
        loss.backward()
    else:
        pre.grad_scaler.scale(loss).backward()
        pre.grad_scaler.unscale_(torch.optim.SGD(model.parameters()))
    try:
        pre.step()
    except ConfigError as error:
        return str(error)
    finally:
        pre.abandon()
    return ""


def first_steps(communicator: Communicator) -> dict[str, str]:
    """Gives the ranks different values of one argument at a time."""
    messages = {name: first_step(communicator, name, values[communicator.rank]) for name, values in DIFFERENT.items()}
    schedules = (lambda step: 0.1 + step, lambda step: 0.1 - step)
    return {**messages, "alike": first_step(communicator, "damping", schedules[communicator.rank])}


def test_ranks_with_different_arguments_are_told_which() -> None:
    for messages in run_ranks(2, first_steps):
        for name, values in DIFFERENT.items():
            first, second = SHOWN.get(name, map(repr, values))
            assert f"the ranks were given different {name}: rank 0: {first}" in messages[name]
            assert f"; rank 1: {second}" in messages[name]
        assert messages["alike"] == "", "schedules are compared by what they say at this step"


def construct(communicator: Communicator) -> tuple[str, int]:
    """Returns what construction raised, and how many hooks it left on the model."""
    model = small_cnn()
    try:
        kfdist.Preconditioner(model, "kfac", lr=0.1, link=FaultyLink())
    except EnvironmentFault as error:
        left = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
        with kfdist.Preconditioner(model, "kfac", lr=0.1) as pre:  # the ranks can still talk to each other
            torch.nn.functional.cross_entropy(model(images(4)[0]), images(4)[1]).backward()
            pre.step()
        return str(error), left
    raise AssertionError("a preconditioner was made without its link")


def test_a_link_that_starts_on_one_rank_alone_is_undone_on_all(faults: Faults) -> None:
    faults.at(start=1).fail("no process to be had")
    for message, hooks_left in run_ranks(2, construct):
        assert "rank 1: no process to be had" in message and "rank 0" not in message
        assert hooks_left == 0


def versions_apart(communicator: Communicator) -> tuple[str, str]:
    """Returns what is said where rank 1 has another kfdist: by `kfdist worker`, and by the library."""
    versions = {"kfdist": f"9.{communicator.rank}.0"}
    with mock.patch.object(worker, "versions", lambda: versions), pytest.raises(EnvironmentFault) as of_worker:
        worker.train_together(load_config(None, environment={}), communicator, torch.device("cpu"))
    with mock.patch.object(assembly, "versions", lambda: versions), pytest.raises(EnvironmentFault) as of_library:
        kfdist.Preconditioner(small_cnn(), "kfac", lr=0.1)
    return str(of_worker.value), str(of_library.value)


def test_ranks_with_different_versions_are_told_which() -> None:
    for of_worker, of_library in run_ranks(2, versions_apart):
        assert of_worker.startswith("the ranks have different versions of kfdist (rank 0: 9.0.0; rank 1: 9.1.0)")
        assert "(rank 0: 9.0.0; rank 1: 9.1.0)" in of_library
