"""`kfdist.Optimizer`'s state, its arguments, and what it chooses by itself."""

import copy
import inspect
import io
import pickle
import typing
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import kfdist
from kfdist.curvature.by_width import FIRST_ORDER, ByWidth
from kfdist.errors import CheckpointError, ConfigError, KfdistError, KfdistWarning
from kfdist.optim.curvature_options import Curvature
from tests.support.optimizing import backward, optimizer_of, small_model, train


@pytest.mark.parametrize("graft", ["adamw", "sgd", None])
def test_a_saved_run_goes_on_bit_for_bit(graft: Any):
    """Also through torch.save, which HF's Trainer reads with weights_only."""
    model = small_model()
    with optimizer_of(model, graft=graft, inverse_period=3) as optimizer:
        train(model, optimizer, 4)
        saved = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
        expected = train(model, optimizer, 5)
    saved.seek(0)
    read = torch.load(saved, weights_only=True)
    other = small_model()
    with optimizer_of(other, graft=graft, inverse_period=3) as optimizer:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as Accelerate does, for the device
        other.load_state_dict(read["model"])
        optimizer.load_state_dict(read["optimizer"])
        again = optimizer.state_dict()
        assert again["preconditioner"]["step"] == 4
        mine = train(other, optimizer, 5)
    assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, pickle.dumps, lambda each: torch.save(each, io.BytesIO())])
def test_a_copy_is_refused_and_the_model_can_be_copied(way: Any):
    """torch's own would leave all behind but moments and groups, and fail at its first step."""
    model = small_model()
    with optimizer_of(model) as optimizer:
        train(model, optimizer, 1)
        for each in (optimizer, optimizer.preconditioner):
            with pytest.raises(KfdistError, match=r"can't be copied or pickled.*load_state_dict\(\)"):
                way(each)
        way(model)
        train(model, optimizer, 1)


def test_its_own_state_of_the_moment_may_be_given_back_at_any_time_as_accelerate_does():
    """So a second Trainer may go on with an optimizer that a first one has trained."""
    found = []
    for again in (False, True):
        model = small_model()
        with optimizer_of(model, inverse_period=3, skip=("2",)) as optimizer:
            train(model, optimizer, 4)
            if again:
                state = optimizer.state_dict()
                optimizer.load_state_dict({**state, "preconditioner": dict(state["preconditioner"])})
                with pytest.raises(KfdistError, match="after a step or another load"):
                    optimizer.load_state_dict(copy.deepcopy(state))
            found.append(train(model, optimizer, 5))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_adamws_state_brings_its_moments():
    model, other = small_model(), small_model()
    adamw = torch.optim.AdamW(model.parameters(), lr=0.5)
    train(model, adamw, 3)
    with optimizer_of(other, skip=("2",)) as optimizer:
        optimizer.load_state_dict(adamw.state_dict())
        assert optimizer.param_groups[0]["lr"] == 0.5
        train(other, optimizer, 1)
        assert float(optimizer.state[other[0].weight]["step"]) == 4.0


def test_a_state_with_a_tensor_for_a_learning_rate_goes_on():
    model, other = small_model(), small_model()
    adamw = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5))
    train(model, adamw, 2)
    saved = io.BytesIO()
    torch.save(adamw.state_dict(), saved)
    saved.seek(0)
    with optimizer_of(other, skip=("2",)) as optimizer:
        optimizer.load_state_dict(torch.load(saved, weights_only=True))
        assert torch.equal(optimizer.param_groups[0]["lr"], torch.tensor(0.5))
        mine = train(other, optimizer, 1)
        again = io.BytesIO()
        torch.save(optimizer.state_dict(), again)
    again.seek(0)
    third = small_model()
    with optimizer_of(third, skip=("2",)) as optimizer:
        optimizer.load_state_dict(torch.load(again, weights_only=True))
        assert float(optimizer.param_groups[0]["lr"]) == 0.5
        third.load_state_dict(other.state_dict())
        assert not any(torch.equal(a, b) for a, b in zip(mine, train(third, optimizer, 1), strict=True))


def test_a_state_of_another_model_or_method_is_refused_by_name_and_changes_nothing():
    torch.manual_seed(0)
    wider = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    with optimizer_of(wider) as optimizer:
        train(wider, optimizer, 1)
        saved = optimizer.state_dict()
    model = small_model()
    with optimizer_of(model) as optimizer:
        with pytest.raises(CheckpointError, match=r"block '0' has a factor"):
            optimizer.load_state_dict(saved)
        without = {key: value for key, value in saved.items() if key != "preconditioner"}
        with pytest.raises(CheckpointError, match=r"parameter 0 has \w+ of shape \(6, 4\) .* has shape \(5, 4\)"):
            optimizer.load_state_dict(without)
        with pytest.raises(CheckpointError, match=r"groups of \[1, 5\] parameters and this optimizer has \[6\]"):
            first, *rest = range(6)
            groups = [{**saved["param_groups"][0], "params": params} for params in ([first], rest)]
            optimizer.load_state_dict({**without, "param_groups": groups})
        assert not optimizer.state
        train(model, optimizer, 1)
        with pytest.raises(KfdistError, match="after a step or another load"):
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with (
        optimizer_of(small_model(), method="rs-kfac") as optimizer,
        pytest.raises(CheckpointError, match="'kfac-eigen' in the checkpoint and has 'rs-kfac' now"),
    ):
        other = small_model()
        with optimizer_of(other) as theirs:
            train(other, theirs, 1)
            optimizer.load_state_dict(theirs.state_dict())


def test_a_checkpoint_of_the_earlier_default_goes_on_with_the_method_that_its_refusal_names():
    """`kfac-eigen` for all isn't that method: norms had no block."""
    model = small_model()
    with optimizer_of(model, method=kfdist.ByWidth()) as optimizer:
        train(model, optimizer, 2)
        saved = copy.deepcopy(optimizer.state_dict())
    for method, message in (("auto", r"default goes on with method=kfdist.ByWidth\(\)"), ("kfac-eigen", "lacks")):
        with (
            optimizer_of(small_model(), method=method) as optimizer,
            pytest.raises(CheckpointError, match=message),
        ):
            optimizer.load_state_dict(saved)
    with optimizer_of(small_model(), method=kfdist.ByWidth()) as optimizer:
        optimizer.load_state_dict(saved)


def test_a_checkpoint_with_wide_layers_of_the_earlier_default_goes_on_with_the_method_that_its_refusal_names():
    def wide_model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(ByWidth().eigen + 1, 2)

    earlier: dict[str, Any] = {
        "method": kfdist.ByWidth(dense=kfdist.EkfacAdam(basis_period=20)),
        "ema_decay": 0.8,
        "adoption": kfdist.FixedLag(0),
    }
    model = wide_model()
    with kfdist.Optimizer(model, **earlier) as optimizer:
        torch.nn.functional.mse_loss(model(torch.randn(4, 1025)), torch.zeros(4, 2)).backward()
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
    with (
        kfdist.Optimizer(wide_model()) as optimizer,
        pytest.raises(CheckpointError, match=r"EkfacAdam\(basis_period=20\)\), ema_decay=0.8"),
    ):
        optimizer.load_state_dict(saved)
    with kfdist.Optimizer(wide_model(), **earlier) as optimizer:
        optimizer.load_state_dict(saved)


def test_methods_on_gradients_have_no_widths():
    with pytest.raises(ConfigError, match="dense: is shampoo, which takes whole parameters"):
        kfdist.ByWidth(dense=kfdist.Shampoo())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1.0}, "lr: "),
    ({"eps": float("nan")}, "eps: "),
    ({"weight_decay": -0.1}, "weight_decay: "),
    ({"betas": (0.9, 1.0)}, r"betas\[1\]: "),
    ({"graft": "adam"}, r'graft: .*"?adamw"?'),
    ({"kl_clip": 1e-3}, r"kl_clip: is 0.001, and graft is 'adamw', .* set kl_clip=None or graft=None"),
    ({"damping": -1.0}, "damping: "),
    ({"method": "kfacc"}, "kfac"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_arguments_are_refused_by_name(changes: dict[str, Any], message: str):
    model = small_model()
    with pytest.raises(ConfigError, match=message):
        optimizer_of(model, **changes)
    with optimizer_of(model):  # and nothing of it is left on the model
        pass


def test_a_group_with_a_bad_setting_is_refused():
    model = small_model()
    with pytest.raises(ConfigError, match="lr: "):
        optimizer_of(model, params=[{"params": list(model.parameters()), "lr": -1.0}])


def test_parameters_of_another_model_are_refused():
    model = small_model()
    with pytest.raises(ConfigError, match="steps none of the preconditioned parameters"):
        optimizer_of(model, params=small_model().parameters())
    with optimizer_of(model):
        pass


def test_a_preconditioner_can_be_given_and_is_closed_with_it():
    model = small_model()
    preconditioner = kfdist.Preconditioner(model, "kfac-eigen", kl_clip=None, skip=("2",))
    with pytest.raises(ConfigError, match="damping can't be set beside a Preconditioner"):
        kfdist.Optimizer(preconditioner, damping=0.1)
    with kfdist.Optimizer(preconditioner, lr=0.1) as optimizer:
        assert optimizer.preconditioner is preconditioner
        train(model, optimizer, 1)
    with pytest.raises(KfdistError, match="after close"):
        backward(model, 0)
        optimizer.step()
    clipping = kfdist.Preconditioner(model, "kfac-eigen", kl_clip=1e-3)
    with pytest.raises(ConfigError, match="kl_clip"):
        kfdist.Optimizer(clipping)
    clipping.close()


def test_the_options_are_those_of_the_preconditioner():
    theirs = dict(inspect.signature(kfdist.Preconditioner).parameters)
    for name in ("model", "lr"):
        del theirs[name]
    mine = typing.get_type_hints(Curvature)
    assert {name: each.annotation for name, each in theirs.items()} == mine


# "auto" ---------------------------------------------------------------------------------------------------------------


class Language(nn.Module):
    def __init__(self, vocabulary: int = 40) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, 8)
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.ones(8))
        self.wide, self.head = nn.Linear(8, 24), nn.Linear(24, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.wide(self.scale * self.norm(self.table(tokens))))


def test_auto_gives_matrices_a_method_by_width_and_leaves_the_rest_to_first_order():
    with kfdist.Preconditioner(Language(), ByWidth(eigen=16, sketched=30), kl_clip=None) as preconditioner:
        coverage = preconditioner.coverage()
    methods = {row.parameter: row.method for row in coverage.rows}
    assert methods == {
        "table.weight": None,
        "norm.weight": None,
        "norm.bias": None,
        "scale": None,
        "wide.weight": "rs-kfac",
        "wide.bias": "rs-kfac",
        "head.weight": None,
        "head.bias": None,
    }
    assert {row.reason for row in coverage.rows if row.method is None} == {FIRST_ORDER}
    assert coverage.left_out() == {}  # wanted: nothing to warn of


@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_makes_no_layer_wider(bias: bool):
    model = nn.Sequential(*(nn.Linear(width, 8, bias=bias) for width in (16, 17, 30, 31)))
    with kfdist.Preconditioner(model, ByWidth(eigen=16, sketched=30), kl_clip=None) as preconditioner:
        methods = {row.parameter: row.method for row in preconditioner.coverage().rows}
    found = [methods[f"{place}.weight"] for place in range(4)]
    assert found == ["kfac-eigen", "rs-kfac", "rs-kfac", None]


@pytest.mark.parametrize(("graft", "method"), [("adamw", "ekfac-adam"), ("sgd", "kfac-eigen"), (None, "kfac-eigen")])
def test_auto_is_the_default_and_measures_nothing(graft: Any, method: str):
    with kfdist.Optimizer(Language(), graft=graft) as optimizer:
        methods = {row.parameter: row.method for row in optimizer.preconditioner.coverage().rows}
        assert methods["wide.weight"] == methods["head.weight"] == method
        assert methods["table.weight"] is None
        assert optimizer.preconditioner.costs is None


@pytest.mark.parametrize(("changes", "expected"), [({}, [20, 100]), ({"inverse_period": 50}, [50, 50])])
def test_the_default_renews_narrow_layers_bases_more_often_unless_periods_are_given(
    changes: dict[str, Any], expected: list[int]
):
    model = nn.Sequential(nn.Linear(30, 2), nn.Linear(2, ByWidth().eigen + 1))
    with kfdist.Optimizer(model, **changes) as optimizer:
        assert periods_of(optimizer) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, 0.8), ({"ema_decay": 0.9}, 0.9), ({"method": "ekfac-adam"}, 0.95), ({"graft": "sgd"}, 0.95)],
)
def test_statistics_forget_sooner_under_the_default(changes: dict[str, Any], expected: float):
    with kfdist.Optimizer(small_model(), **changes) as optimizer:
        assert optimizer.preconditioner.settings.ema_decay == expected
    with kfdist.Preconditioner(small_model()) as preconditioner:
        assert preconditioner.settings.ema_decay == 0.95 and preconditioner.settings.inverse_period == 100


def periods_of(optimizer: kfdist.Optimizer) -> list[int]:
    preconditioner = optimizer.preconditioner
    ((_, period),) = [(each.begin, each.inverse_period) for each in preconditioner.settings.schedules(groups=0)]
    return [group.inverter.update_period(10, period) for group in preconditioner.groups]


def test_what_no_block_can_have_is_said_to_be_stepped_by_a_first_order_method():
    model = small_model()
    nn.utils.parametrizations.weight_norm(model[0])
    with (
        optimizer_of(model, skip=("2",)) as optimizer,
        pytest.warns(KfdistWarning, match=r"no block: .*weight.* The Optimizer steps them by a first-order method"),
    ):
        train(model, optimizer, 1)


class Multiplied(nn.Module):
    """Multiplies with a weight in a way that isn't known before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * 0.5)


def pruned(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "weight", 0.5)


HOOKS: dict[str, Any] = {
    "norm": (nn.utils.weight_norm, "weight_v"),
    "spectral norm": (nn.utils.spectral_norm, "weight_orig"),
    "pruned": (pruned, "weight_orig"),
    "scaled": (None, "weight"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("method", ["auto", "ekfac-adam"])
@pytest.mark.parametrize("how", HOOKS)
def test_a_weight_that_is_computed_is_said_to_be_stepped_by_a_first_order_method(how: str, method: str):
    model, (hook, name) = small_model(), HOOKS[how]
    if hook is None:
        model[0] = Multiplied()
    else:
        hook(model[0])
    why = "no product with it is found" if hook is None else "its weight is computed"
    said = rf"no block: '0\.{name}': .*{why}.* The Optimizer steps them by a first-order method"
    with optimizer_of(model, method=method) as optimizer:
        with pytest.warns(KfdistWarning, match=said):
            train(model, optimizer, 1)
        assert list(optimizer.preconditioner.coverage().left_out()) == [f"0.{name}"]


@pytest.mark.parametrize("make", [kfdist.Optimizer, kfdist.Preconditioner])
def test_parameters_in_the_place_of_the_model_are_refused_with_where_they_go(make: Any) -> None:
    parameters = list(small_model().parameters())
    for given in (parameters, iter(parameters), [{"params": parameters}]):
        with pytest.raises(ConfigError, match=r"^model: is a .* and must be the model itself.* as `params`"):
            make(given)
