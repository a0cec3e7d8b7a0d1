"""Real steps of a plan's model: made where they are cheap, left alone where they aren't, and never in a plan's way."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from kfdist.config import Config, load_config
from kfdist.forecast.inversion_costs import Costs, measure
from kfdist.forecast.outline import Given, Outline, make_outline
from kfdist.forecast.trial_steps import Trial, try_steps
from kfdist.runtime.plan.planner import Plan
from kfdist.training.method import plan_of

HERE = "tests.unit.forecast.test_trial_steps"


class Refuses(nn.Module):
    """Has values in view only where there are some."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        if not images.is_meta:
            raise RuntimeError("no such thing\nas values")
        return self.layer(images.flatten(1))


def refuses(example_shape: torch.Size, classes: int) -> nn.Module:
    return Refuses()


def planned(*overrides: str) -> tuple[Config, Outline, Plan, Costs]:
    config = load_config(None, environment={}, overrides=["cluster.workers=1", "data.batch_size=8", *overrides])
    outline = make_outline(config, Given())
    plan = plan_of(config, outline.model, world_size=1, costs=None)
    return config, outline, plan, measure(plan.groups, threads=1)


@pytest.mark.parametrize("more", ['preconditioner.fisher="mc"', "data.micro_batches=2", 'preconditioner.method="none"'])
def test_steps_of_the_configured_run_are_made(more: str) -> None:
    threads = torch.get_num_threads()
    found = try_steps(*planned(more), 1e6)
    assert found.seconds is not None and found.seconds > 0 and found.steps >= 3 and not found.why_not
    assert torch.get_num_threads() == threads


def test_what_is_dear_is_left_alone() -> None:
    config, outline, plan, costs = planned()
    assert try_steps(config, outline, plan, costs, 1e15).seconds is None
    slow = replace(
        costs, methods={name: replace(each, factor=1e6) for name, each in costs.methods.items()}, measured={}
    )
    assert try_steps(config, outline, plan, slow, 1e6) == Trial(None, why_not="real steps would take too long here")


def test_a_model_that_fails_is_told_in_a_line() -> None:
    found = try_steps(*planned(f'model.name="{HERE}:refuses"'), 1e6)
    assert found.seconds is None and found.why_not == "real steps ended with RuntimeError: no such thing"
