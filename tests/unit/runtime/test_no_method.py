"""The method "none": a Preconditioner like any other, whose plan has no groups."""

import pytest
import torch

import kfdist
from kfdist.errors import CheckpointError
from kfdist.runtime.plan.planner import NONE
from tests.support.plans import planned, settings
from tests.support.preconditioning import backward, gradients, two_layers


def trained(*, preconditioned: bool) -> list[torch.Tensor]:
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if preconditioned:
        kfdist.Preconditioner(model, NONE).attach(optimizer)
    for step in range(5):
        optimizer.zero_grad()
        backward(model, seed=step)
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def test_the_optimizer_steps_as_it_would_alone():
    for own, plain in zip(trained(preconditioned=True), trained(preconditioned=False), strict=True):
        assert torch.equal(own, plain)


def test_gradients_stay_and_the_model_has_no_hooks():
    model = two_layers()
    with kfdist.Preconditioner(model, NONE) as pre:  # the default KL clip needs no learning rate here
        backward(model)
        before = gradients(model)
        report = pre.step()
        assert (report.step, report.adopted, pre.next_step) == (0, (), 1)
        assert all(torch.equal(old, new) for old, new in zip(before, gradients(model), strict=True))
        assert pre.staleness() == pre.versions() == {}
        assert pre.counters()["inversions"] == {"completed": 0, "failed": 0, "by_method": {}}
        assert {sample.name for sample in pre.samples()} >= {"kfdist_steps_total"}
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_coverage_says_that_the_optimizer_has_everything():
    rows = planned(two_layers(), NONE).coverage.rows
    assert [row.parameter for row in rows] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert {(row.block, row.method, row.reason) for row in rows} == {
        (None, None, 'method "none" leaves it to the optimizer')
    }


def test_a_stop_is_agreed_on():
    model = two_layers()
    with kfdist.Preconditioner(model, NONE) as pre:
        pre.request_stop()
        backward(model)
        assert [pre.step().stop for _ in range(3)][-1]


def test_a_state_goes_on_where_it_was_saved_and_fits_no_method():
    model = two_layers()
    with kfdist.Preconditioner(model, NONE) as pre:
        for _ in range(3):
            pre.step()
        state = pre.state_dict()
    with kfdist.Preconditioner(model, NONE) as pre:
        pre.load_state_dict(state)
        assert pre.step().step == 3
    with kfdist.Preconditioner(model, "kfac", lr=0.1) as pre, pytest.raises(CheckpointError, match="that the model"):
        pre.load_state_dict(state)


def test_a_plan_is_for_its_number_of_ranks():
    plan = planned(two_layers(), "kfac", world_size=2)
    with pytest.raises(kfdist.KfdistError, match="the plan is for 2 ranks, and there are 1"):
        kfdist.Preconditioner.from_plan(plan)


def test_a_plan_and_arguments_make_the_same_preconditioner():
    model = two_layers()
    plan = planned(model, {"0": "kfac-eigen", "2": "kfac"}, damping=0.5, kl_clip=None)
    with kfdist.Preconditioner.from_plan(plan) as one:
        pass
    with kfdist.Preconditioner(model, {"0": "kfac-eigen", "2": "kfac"}, damping=0.5, kl_clip=None) as other:
        assert one.settings == other.settings == settings(damping=0.5, kl_clip=None)
        assert [(each.name, each.inverter) for each in one.groups] == [
            (each.name, each.inverter) for each in other.groups
        ]
