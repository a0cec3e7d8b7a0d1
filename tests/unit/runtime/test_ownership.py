"""A parameter has one Preconditioner at a time."""

import gc
from typing import Any

import pytest
import torch
from torch import nn

import kfdist
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.links.link import AbstractLink
from kfdist.links.local import LocalLink
from tests.support.preconditioning import backward, preconditioner, two_layers


def test_a_second_one_over_the_same_parameters_is_refused_until_the_first_is_closed():
    model = two_layers()
    first = preconditioner(model)
    with pytest.raises(ConfigError, match=r"4 of the parameters \('0\.weight', \.\.\.\).*close\(\) it first"):
        preconditioner(model)
    backward(model)
    assert first.step().step == 0, "the refusal leaves the first as it was"
    first.close()
    preconditioner(model).close()


def test_one_that_was_abandoned_or_forgotten_is_in_nobodys_way():
    model = two_layers()
    with pytest.raises(ValueError, match="the script"), preconditioner(model):
        raise ValueError("the script")
    circle: list[Any] = [preconditioner(model)]
    circle.append(circle)
    del circle
    preconditioner(model).close()


def test_one_that_an_optimizer_holds_is_in_the_way_as_long_as_the_optimizer_lives():
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner(model, lr=None).attach(optimizer)
    gc.collect()
    with pytest.raises(ConfigError, match="another Preconditioner's"):
        preconditioner(model)
    del optimizer
    preconditioner(model).close()


def test_layers_that_nobody_has_are_free():
    model = two_layers()
    with preconditioner(model, skip=["2"]), preconditioner(model, skip=["0"]):
        pass
    with kfdist.Preconditioner(model, "none"), preconditioner(model):
        pass


def test_one_parameter_in_two_models_has_one_owner():
    first, second = two_layers(), nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    second[0].weight = first[0].weight
    with preconditioner(first), pytest.raises(ConfigError, match=r"1 of the parameters \('0\.weight'"):
        preconditioner(second)


def test_one_that_could_not_start_has_nothing():
    class Broken(LocalLink):
        def start(self, context: Any) -> None:
            raise OSError("no socket")

    link: AbstractLink = Broken()
    model = two_layers()
    with pytest.raises(EnvironmentFault):
        preconditioner(model, link=link)
    preconditioner(model).close()
