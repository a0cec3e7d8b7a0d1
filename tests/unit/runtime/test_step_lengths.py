"""How far steps move each group, and what grafts do to lengths: measured where somebody asks, and told by rank 0."""

import torch
from torch import Tensor, nn

import kfdist
from kfdist.runtime.step_lengths import ENTRIES, PERIOD, StepLengths
from kfdist.telemetry.metrics import fault_in
from tests.support.kernel_launches import Launches
from tests.support.optimizing import backward as backward_of
from tests.support.optimizing import optimizer_of, small_model
from tests.support.preconditioning import backward, preconditioner, two_layers

LR = 0.1


def told(pre: kfdist.Preconditioner, name: str) -> dict[str, float]:
    samples = pre.samples()
    assert {fault_in(sample) for sample in samples} == {""}
    return {sample.labels.get("block", ""): sample.value for sample in samples if sample.name == f"kfdist_{name}"}


def copies(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().clone().reshape(-1) for p in module.parameters()])


def test_a_step_of_sgd_has_the_length_of_its_direction_times_the_rate():
    model = two_layers()
    sgd = torch.optim.SGD(model.parameters(), lr=LR)
    with preconditioner(model) as pre:
        assert told(pre, "step_length_ratio") == {}  # and asks
        expected = {}
        for step in range(2):
            backward(model, seed=step)
            pre.step()
            if step == 0:
                for name in ("0", "2"):
                    layer = model.get_submodule(name)
                    direction = torch.cat([p.grad.reshape(-1) for p in layer.parameters() if p.grad is not None])
                    expected[name] = float(LR * direction.norm() / copies(layer).norm())
            sgd.step()
            model.zero_grad()
        found = told(pre, "step_length_ratio")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(found[name] / value - 1) < 1e-12


def test_the_optimizers_own_steps_are_measured_with_decay_and_momentum():
    model = small_model()
    with optimizer_of(model, method="ekfac-adam") as optimizer:
        pre = optimizer.preconditioner
        pre.samples()
        before = copies(model[0])
        backward_of(model, 0)
        optimizer.step()
        after = copies(model[0])
        backward_of(model, 1)
        optimizer.step()
        found = told(pre, "step_length_ratio")
        assert abs(found["0"] - float((after - before).norm() / before.norm())) < 1e-12
        assert told(pre, "graft_ratio") == {} and told(pre, "graft_replacements_total") == {}  # nothing is grafted


def test_a_grafts_factor_and_how_often_it_took_over():
    model = small_model()
    with optimizer_of(model, graft="sgd") as optimizer:
        pre = optimizer.preconditioner
        backward_of(model, 0)
        optimizer.precondition()
        expected = {}
        for name, layer in (("0", model[0]), ("3", model[3])):
            directions = torch.cat([optimizer._directions[p].reshape(-1) for p in layer.parameters()])
            gradients = torch.cat([p.grad.reshape(-1) for p in layer.parameters() if p.grad is not None])
            expected[name] = float(gradients.norm() / directions.norm())
        optimizer.step()
        found = told(pre, "graft_ratio")
        for name, value in expected.items():
            assert abs(found[name] / value - 1) < 1e-12
        assert told(pre, "graft_replacements_total") == {"": 0.0}

        backward_of(model, 1)
        for parameter in model[0].parameters():  # no direction: the gradient is zero
            assert parameter.grad is not None
            parameter.grad.zero_()
        optimizer.step()
        assert told(pre, "graft_replacements_total") == {"": 2.0} == {"": optimizer.replaced}
        assert "0" not in told(pre, "graft_ratio") and "3" in told(pre, "graft_ratio")


def test_nothing_is_kept_where_nobody_asks_and_one_step_in_ten_is_measured_at_most():
    weight = nn.Parameter(torch.ones(4))
    lengths = StepLengths({"fc": [weight]})
    measured = []
    for step in range(2 * PERIOD + 1):
        if step == 0:
            lengths.begin()
            assert lengths._before is None
        lengths.ask()
        lengths.begin()
        measured.append(lengths._before is not None)
        with torch.no_grad():
            weight.mul_(1.5)
        lengths.end()
        assert lengths._before is None
    assert [step for step, kept in enumerate(measured) if kept] == [0, PERIOD, 2 * PERIOD]
    assert lengths.latest() == {"fc": 0.5}


def test_a_large_parameter_is_sampled_and_counts_by_its_size():
    torch.manual_seed(0)
    large, small = nn.Parameter(torch.randn(64, 40 * ENTRIES // 64)), nn.Parameter(torch.randn(7))
    lengths = StepLengths({"fc": [large, small], "zero": [nn.Parameter(torch.zeros(3))]})
    state = torch.get_rng_state()
    lengths.ask()
    lengths.begin()
    assert lengths._before is not None and max(each.numel() for each in lengths._before) == ENTRIES
    before = torch.cat([large.detach().reshape(-1), small.detach()])
    change = torch.cat([0.01 * torch.randn_like(large).reshape(-1), 3.0 * torch.ones_like(small)])
    torch.set_rng_state(state)
    with torch.no_grad():
        large.add_(change[: large.numel()].view_as(large))
        small.add_(change[large.numel() :])
    lengths.end()
    assert torch.equal(torch.get_rng_state(), state)
    found = lengths.latest()
    assert found.keys() == {"fc"}
    assert abs(found["fc"] / float(change.norm() / before.norm()) - 1) < 0.03


def test_a_large_parameter_is_not_copied_whichever_its_layout():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(64, 40, 5, 5).to(memory_format=torch.channels_last))]
    weights += [nn.Parameter(torch.randn(300, 200).mT), nn.Parameter(torch.randn(300, 200))]
    lengths = StepLengths({"fc": weights})
    lengths.ask()
    with Launches() as counted:
        lengths.begin()
    assert counted.by_name["clone"] == 0 < counted.by_name["index"]
    with torch.no_grad():
        for weight in weights:
            weight.mul_(1.25)
    lengths.end()
    assert abs(lengths.latest()["fc"] - 0.25) < 1e-6


def test_parameters_that_do_not_move_have_length_zero():
    model = two_layers()
    with preconditioner(model) as pre:
        pre.samples()
        for step in range(2):
            backward(model, seed=step)
            pre.step()
        assert told(pre, "step_length_ratio") == {"0": 0.0, "2": 0.0}
