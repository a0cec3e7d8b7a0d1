"""Optimizers by name and learning rates by step."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kfdist
from kfdist.config import OptimizerSection, PreconditionerSection, load_config
from kfdist.data.sampler import Position, Sampler
from kfdist.errors import CheckpointError, ConfigError
from kfdist.optim.graft import KEPT
from kfdist.training.method import damping_of, inverse_periods, kl_clip_of
from kfdist.training.optimizers import (
    LearningRate,
    check_optimizer,
    make_optimizer,
    optimizer_of,
    optimizers,
    restore_optimizer,
)


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2, 2))]


@pytest.mark.parametrize("name", sorted(optimizers()))
def test_every_optimizer_that_is_offered_can_be_made_and_steps(name: str):
    weights = parameters()
    optimizer = make_optimizer(OptimizerSection(name=name, lr=0.1), weights)
    assert optimizer.param_groups[0]["lr"] == 0.1
    weights[0].grad = torch.ones(2, 2)
    optimizer.step()
    assert not torch.equal(weights[0].detach(), torch.ones(2, 2))


def test_the_usual_ones_are_offered_and_those_that_do_not_fit_are_not():
    assert {"sgd", "adam", "adamw"} <= set(optimizers())
    assert {"lbfgs", "sparseadam", "optimizer"}.isdisjoint(optimizers())


def test_arguments_arrive():
    section = OptimizerSection(name="sgd", momentum=0.5, weight_decay=0.25, settings={"nesterov": True})
    sgd = make_optimizer(section, parameters())
    assert {key: sgd.defaults[key] for key in ("momentum", "weight_decay", "nesterov")} == {
        "momentum": 0.5,
        "weight_decay": 0.25,
        "nesterov": True,
    }
    adam = make_optimizer(OptimizerSection(name="adam", settings={"betas": [0.5, 0.75]}), parameters())
    assert adam.defaults["betas"] == (0.5, 0.75)


@pytest.mark.parametrize(
    ("section", "path", "words"),
    [
        (OptimizerSection(name="sdg"), "optimizer.name", "did you mean 'sgd'"),
        (
            OptimizerSection(name="sgd", settings={"nestrov": True}),
            "optimizer.settings.nestrov",
            "did you mean 'nesterov'",
        ),
        (
            OptimizerSection(name="sgd", momentum=0.0, settings={"nesterov": True}),
            "optimizer.settings",
            "sgd refuses .*Nesterov",
        ),
        (OptimizerSection(name="adam", settings={"betas": [2.0, 0.5]}), "optimizer.settings", "adam refuses .*beta"),
        (
            OptimizerSection(name="adam", settings={"betas": 0.9}),
            "optimizer.settings",
            r"adam refuses \{'betas': 0.9\}.*; by default they are \{'betas': \(0.9, 0.999\)\}",
        ),
    ],
)
def test_mistakes_are_told(section: OptimizerSection, path: str, words: str):
    with pytest.raises(ConfigError, match=f"^{path}: .*{words}"):
        make_optimizer(section, parameters())


def test_the_shapes_of_the_schedules():
    def rates(total: int = 100, **values) -> list[float]:
        rate = LearningRate(section=OptimizerSection(lr=1.0, **values), total_steps=total)
        return [rate(step) for step in (0, 25, 50, 75, 100, 200)]

    assert rates(schedule="constant") == [1.0] * 6
    assert rates(schedule="linear") == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert rates(schedule="linear", final_lr_fraction=0.5) == [1.0, 0.875, 0.75, 0.625, 0.5, 0.5]
    assert rates(schedule="cosine") == pytest.approx([1.0, 0.853553, 0.5, 0.146447, 0.0, 0.0], abs=1e-6)
    assert rates(schedule="step", milestones=(50, 75)) == pytest.approx([1.0, 1.0, 0.1, 0.01, 0.01, 0.01])
    assert rates(schedule="linear", warmup_steps=50) == [1 / 50, 26 / 50, 1.0, 0.5, 0.0, 0.0]


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 20), st.integers(1, 60), st.floats(0, 1))
def test_a_schedule_rises_to_its_peak_and_never_again(schedule: str, warmup: int, total: int, final: float):
    section = OptimizerSection(lr=0.5, schedule=schedule, warmup_steps=warmup, final_lr_fraction=final)  # type: ignore[arg-type]
    rates = [LearningRate(section=section, total_steps=total)(step) for step in range(warmup + total)]
    assert max(rates) == 0.5
    assert all(0 <= rate <= 0.5 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_biases_and_norms_may_stay_undecayed():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))
    section = OptimizerSection(name="sgd", lr=0.1, decay_vectors=False, weight_decay=0.1)
    decayed, rest = make_optimizer(section, model.parameters()).param_groups
    assert [parameter.dim() for parameter in decayed["params"]] == [4, 2] and decayed["weight_decay"] == 0.1
    assert [parameter.dim() for parameter in rest["params"]] == [1, 1, 1, 1] and rest["weight_decay"] == 0.0
    assert (decayed["lr"], rest["momentum"]) == (0.1, 0.9)


def test_epochs_stay_where_they_were_when_the_number_of_ranks_changes():
    """Three epochs of 10 steps on one rank; then two ranks go on, in 5 steps an epoch."""
    one, two = (Sampler(examples=40, batch_size=4, world_size=ranks, seed=0) for ranks in (1, 2))
    position, steps = Position(), 30
    for step in range(steps):
        assert one.epoch_zero(step, position) == 0
        position = one.advance(position)
    begin = two.epoch_zero(steps, position)
    section = OptimizerSection(lr=1.0, schedule="step", milestone_epochs=(4, 6), warmup_epochs=1)
    rate = LearningRate(section=section, total_steps=60, steps_per_epoch=5, epoch_zero=begin)
    assert [rate(step) for step in (30, 34, 35, 44, 45)] == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01])
    damped = PreconditionerSection(damping=1.0, damping_decay=0.5)
    damping = damping_of(damped, steps_per_epoch=5, epoch_zero=begin)
    assert damping(30) == 0.125 and damping(35) == 0.0625
    kl_clip = kl_clip_of(
        PreconditionerSection(kl_clip=1.0, kl_clip_epochs=((2, 0.5), (4, 0.1))), steps_per_epoch=5, epoch_zero=begin
    )
    assert kl_clip is not None and [kl_clip(step) for step in (24, 25, 34, 35)] == [1.0, 0.5, 0.5, 0.1]
    assert kl_clip_of(damped, steps_per_epoch=5) is None
    changing = PreconditionerSection(inverse_period=20, inverse_period_epochs=((2, 30), (5, 10)))
    assert inverse_periods(changing, steps_per_epoch=5, epoch_zero=begin) == {0: 20, 25: 30, 40: 10}
    assert inverse_periods(changing, steps_per_epoch=5, epoch_zero=-20) == {0: 30, 5: 10}


@pytest.mark.parametrize(
    ("ranks", "steps", "after"), [((1, 2), 20, 11 / 25), ((2, 1), 10, 21 / 50), ((1, 2), 23, 0.52)]
)
def test_a_warm_up_goes_on_from_where_it_was_when_the_number_of_ranks_changes(
    ranks: tuple[int, int], steps: int, after: float
):
    """Five epochs of 10 steps on one rank, or 5 on two; the last case changes in mid-epoch, with 3 steps left of 5."""
    old, new = (Sampler(examples=40, batch_size=4, world_size=count, seed=0) for count in ranks)
    position, section = Position(), OptimizerSection(lr=1.0, schedule="constant", warmup_epochs=5)
    for _ in range(steps):
        position = old.advance(position)
    rate = LearningRate(
        section=section,
        total_steps=1000,
        steps_per_epoch=new.steps_per_epoch,
        epoch_zero=new.epoch_zero(steps, new.start(position)),
    )
    assert rate(steps) == pytest.approx(after)
    rates = [rate(step) for step in range(steps, steps + 50)]
    assert rates == sorted(rates) and rates[-1] == 1.0
    assert all(b - a < 1.001 / (5 * new.steps_per_epoch) for a, b in pairwise(rates))


# kfdist's own -------------------------------------------------------------------------------------------------------


def own_optimizer(**changes: Any) -> kfdist.Optimizer:
    section = OptimizerSection(**{"name": "kfdist", "lr": 0.5, "momentum": 0.7, "weight_decay": 0.25, **changes})
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    check_optimizer(section, model.parameters(), [])
    preconditioner = kfdist.Preconditioner(model, "kfac-eigen", kl_clip=None)
    made = optimizer_of(section, preconditioner)
    assert isinstance(made, kfdist.Optimizer) and made.preconditioner is preconditioner
    made.close()
    return made


def test_kfdists_own_optimizer_is_made_of_the_section() -> None:
    made = own_optimizer(decay_vectors=False)
    assert made.graft == "adamw"
    matrices, vectors = made.param_groups
    assert (matrices["lr"], matrices["betas"], matrices["weight_decay"]) == (0.5, (0.7, 0.999), 0.25)
    assert {p.dim() for p in vectors["params"]} == {1} and vectors["weight_decay"] == 0.0
    made = own_optimizer(settings={"graft": "none", "betas": [0.5, 0.75], "eps": 1e-6})
    (group,) = made.param_groups
    assert (made.graft, list(group["betas"]), group["eps"]) == (None, [0.5, 0.75], 1e-6)


def test_messages_call_it_by_the_name_that_users_know() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))
    with kfdist.Preconditioner(model, "kfac-eigen", kl_clip=None) as preconditioner:
        made = optimizer_of(OptimizerSection(name="kfdist"), preconditioner)
        with pytest.warns(kfdist.errors.KfdistWarning, match=r"no block: .* The Optimizer steps them"):
            for _ in range(11):
                model(torch.ones(5, 3)).square().sum().backward()
                made.step()
    assert repr(made).startswith("Optimizer (") and type(made).__qualname__ == "Optimizer"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"graf": "sgd"}, r"optimizer\.settings\.graf: unknown key.*graft"),
        ({"graft": "adam"}, r"optimizer\.settings\.graft: "),
        ({"betas": [0.9, 1.0]}, r"optimizer\.settings\.betas\[1\]: "),
        ({"betas": [0.9]}, r"optimizer\.settings\.betas: is \[0.9\]; two numbers"),
    ],
)
def test_its_settings_are_checked_before_anything_is_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_optimizer(OptimizerSection(name="kfdist", settings=settings), [], [])


def test_a_graft_has_no_clip_and_an_explicit_one_is_refused() -> None:
    own = ["optimizer.name=kfdist"]
    assert load_config(None, overrides=own, environment={}).preconditioner.kl_clip == 0.0
    without = [*own, "optimizer.settings.graft=none"]
    assert load_config(None, overrides=without, environment={}).preconditioner.kl_clip == 1e-3
    with pytest.raises(ConfigError, match=r"preconditioner\.kl_clip: is 0.01.*set it to 0, or optimizer"):
        load_config(None, overrides=[*own, "preconditioner.kl_clip=0.01"], environment={})


@pytest.mark.parametrize(("key", "value"), [("kl_clip_epochs", "[[2, 0.1]]"), ("kl_clip_decay", "0.5")])
@pytest.mark.parametrize("clip", [[], ["preconditioner.kl_clip=0.01"]])
def test_a_schedule_of_the_clip_goes_with_no_graft(key: str, value: str, clip: list[str]) -> None:
    own = ["optimizer.name=kfdist", f"preconditioner.{key}={value}", *clip]
    with pytest.raises(ConfigError, match=rf"preconditioner\.{key}: .* its graft's, .*: leave it out, or set optim"):
        load_config(None, overrides=own, environment={})
    clipped = load_config(None, overrides=[*own, "optimizer.settings.graft=none"], environment={})
    assert clipped.preconditioner.kl_clip > 0
    with pytest.raises(ConfigError, match=r"preconditioner\.kl_clip: is 0, .* no clip to begin a schedule with"):
        off = ["optimizer.name=sgd", "preconditioner.method=kfac", "preconditioner.kl_clip=0", own[1]]
        load_config(None, overrides=off, environment={})


@pytest.mark.parametrize("graft", ["adamw", "sgd", "none"])
def test_what_it_keeps_of_each_parameter_is_as_planned(graft: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    with kfdist.Optimizer(
        model,
        graft=None if graft == "none" else graft,  # type: ignore[arg-type]
        method={"0": "kfac-eigen"},
    ) as made:
        model(torch.ones(5, 3)).square().sum().backward()
        made.step()
        shapes = {p: sum(each.shape == p.shape for each in made.state[p].values()) for p in model.parameters()}
    assert [shapes[p] for p in model.parameters()] == [KEPT[graft].of_blocks] * 2 + [KEPT[graft].of_others] * 2


def stepped(section: OptimizerSection) -> tuple[torch.optim.Optimizer, nn.Parameter, nn.Parameter]:
    weight, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = make_optimizer(section, [weight, bias])
    for parameter in (weight, bias):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer, weight, bias


@pytest.mark.parametrize("name", sorted(set(optimizers()) - {"muon"}))  # which takes no bias
def test_every_optimizer_goes_on_from_its_own_state_with_the_settings_of_now(name: str):
    saved = stepped(OptimizerSection(name=name, weight_decay=0.0))[0].state_dict()
    section = OptimizerSection(name=name, momentum=0.5, weight_decay=0.25)
    optimizer, *parameters = stepped(section)
    configured = [{**group, "params": None} for group in optimizer.param_groups]
    restore_optimizer(optimizer, section, saved)
    assert [{**group, "params": None} for group in optimizer.param_groups] == configured
    for number, parameter in enumerate(parameters):
        state = saved["state"].get(number, {})
        assert optimizer.state[parameter].keys() == state.keys()
        optimizer.step()


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({"name": "sgd"}, {"name": "adamw"}, "kept momentum_buffer .* and adamw .* needs exp_avg, exp_avg_sq, step"),
        ({"name": "adamw"}, {"name": "sgd"}, "kept exp_avg, exp_avg_sq, step .* and sgd .* needs momentum_buffer"),
        ({"name": "adam"}, {"name": "adam", "settings": {"amsgrad": True}}, "max_exp_avg_sq"),
        ({"name": "sgd", "decay_vectors": False}, {"name": "sgd"}, "number of parameter groups"),
    ],
)
def test_a_state_that_lacks_what_the_optimizer_goes_on_from_is_refused(before: dict, after: dict, words: str):
    saved = stepped(OptimizerSection(**before))[0].state_dict()
    section = OptimizerSection(**after)
    with pytest.raises(CheckpointError, match=words):
        restore_optimizer(stepped(section)[0], section, saved)


def test_moments_that_two_optimizers_have_in_common_are_taken_over():
    saved = stepped(OptimizerSection(name="adam"))[0].state_dict()
    section = OptimizerSection(name="adamw", settings={"betas": [0.5, 0.75]})
    optimizer, weight, _ = stepped(section)
    restore_optimizer(optimizer, section, saved)
    assert torch.equal(optimizer.state[weight]["exp_avg"], saved["state"][0]["exp_avg"])
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.75)
