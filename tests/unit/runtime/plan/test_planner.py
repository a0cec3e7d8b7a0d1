"""Which layer gets which method, under which name, and what is said of the rest."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import kfdist
from kfdist.curvature.by_width import FIRST_ORDER
from kfdist.curvature.inverters import make_inverter
from kfdist.errors import ConfigError
from tests.support.plans import planned


class Attention(nn.Module):
    """A layer inside a container inside the model, next to what has no block."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
        self.attention = nn.MultiheadAttention(4, 2)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(4, 10)


def methods(model: nn.Module, method: Any, **kwargs: Any) -> dict[str, str]:
    """The methods of the blocks that have a choice, by group."""
    found = {group.name: group.inverter.name for group in planned(model, method, **kwargs).groups}
    assert all(found[name] == fixed for name, fixed in FIXED.items() if name in found)
    return {name: method for name, method in found.items() if name not in FIXED}


def reasons(model: nn.Module, method: Any = "kfac", **kwargs: Any) -> dict[str, str]:
    return {row.parameter: row.reason for row in planned(model, method, **kwargs).coverage.rows if row.block is None}


ATTENTION = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj"]
LAYERS = ["encoder.0", "encoder.2.0", "encoder.2.1", *ATTENTION, "head"]
FIXED = {"scale": "unit-wise", "encoder.1": "unit-wise", "embedding": "kfac-diagonal"}


def test_a_name_or_an_inverter_is_for_all_layers():
    assert methods(Attention(), "kfac") == dict.fromkeys(LAYERS, "kfac")
    assert methods(Attention(), make_inverter("rs-kfac", rank=3)) == dict.fromkeys(LAYERS, "rs-kfac")


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"head": "kfac-eigen", "*": "kfac"}, {"head": "kfac-eigen"}),
        ({"*": "kfac", "head": "kfac-eigen"}, {}),  # the first match wins
        ({"encoder.*": "kfac-eigen", "*": "kfac"}, dict.fromkeys(LAYERS[:3], "kfac-eigen")),
        ({"encoder": "kfac-eigen", "*": "kfac"}, dict.fromkeys(LAYERS[:3], "kfac-eigen")),  # a container
        ({"*.2": "kfac-eigen", "*": "kfac"}, dict.fromkeys(LAYERS[1:3], "kfac-eigen")),
        ({"encoder.[!2]": "kfac-eigen", "*": "kfac"}, {"encoder.0": "kfac-eigen"}),
        ({"attention": "kfac-eigen", "*": "kfac"}, dict.fromkeys(ATTENTION, "kfac-eigen")),
        ({"*.q_proj": "kfac-eigen", "*": "kfac"}, {"attention.q_proj": "kfac-eigen"}),
        ({"encoder.2.0": make_inverter("rs-kfac", rank=2), "*": "kfac"}, {"encoder.2.0": "rs-kfac"}),
    ],
    ids=str,
)
def test_the_first_glob_that_matches_wins(table: Mapping[str, Any], expected: dict[str, str]):
    assert methods(Attention(), table) == dict.fromkeys(LAYERS, "kfac") | expected


def test_layers_that_no_glob_matches_keep_their_gradient_and_say_so():
    assert methods(Attention(), {"head": "kfac"}) == {"head": "kfac"}
    assert reasons(Attention(), {"head": "kfac"})["encoder.0.weight"] == "no pattern of the method table matches"


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (("head",), LAYERS[:-1]),
        (("encoder", "attention"), ["head"]),
        (("encoder.2.*", "head", "*.out_proj"), ["encoder.0", *ATTENTION[:3]]),
        (("*.0", "*.k_proj"), ["encoder.2.1", ATTENTION[0], *ATTENTION[2:], "head"]),
    ],
)
def test_skip_leaves_out_modules_with_all_they_contain(skip: tuple[str, ...], left: list[str]):
    assert list(methods(Attention(), "kfac", skip=skip)) == left
    assert reasons(Attention(), skip=("head",))["head.weight"] == "skipped by configuration"


@pytest.mark.parametrize("glob", ["heat", "encoder.9", "ENCODER", "encoder.*.*.*"])
def test_a_glob_that_matches_no_layer_is_refused_with_the_layers(glob: str):
    for arguments in ({"method": {glob: "kfac", "*": "kfac"}}, {"method": "kfac", "skip": (glob,)}):
        with pytest.raises(ConfigError, match=r"matches no layer.*'encoder\.0'"):
            planned(Attention(), **arguments)  # type: ignore[arg-type]


def test_a_glob_that_matches_only_modules_without_parameters_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="'1' matches no layer"):
        planned(model, "kfac", skip=("1",))


@pytest.mark.parametrize("method", [{}, {"*": 3}, {"*": None}, 7, "kfak"])
def test_a_method_that_is_none_is_refused(method: Any):
    with pytest.raises(ConfigError):
        planned(Attention(), method)


def test_coverage_lists_every_parameter_with_its_block_or_the_reason():
    model = Attention()
    model.encoder[0].bias.requires_grad_(False)
    coverage = planned(model, "kfac", skip=("encoder.2.1",)).coverage
    assert list(dict.fromkeys(row.parameter for row in coverage.rows)) == [name for name, _ in model.named_parameters()]
    said = {row.parameter: row.block or row.reason for row in coverage.rows}
    assert said["encoder.0.weight"] == "encoder.0"
    assert said["encoder.0.bias"] == "it is frozen (requires_grad is False)"
    assert said["encoder.2.0.bias"] == "encoder.2.0"
    assert said["encoder.2.1.weight"] == "skipped by configuration"
    assert said["embedding.weight"] == "embedding"
    assert said["encoder.1.weight"] == said["encoder.1.bias"] == "encoder.1"
    assert [row.block for row in coverage.rows if row.parameter == "attention.in_proj_bias"] == ATTENTION[:3]
    assert said["attention.out_proj.weight"] == "attention.out_proj"
    assert said["scale"] == "scale"
    assert all((row.block is None) == (row.method is None) == (row.reason != "") for row in coverage.rows)
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    assert sum(row.elements for row in coverage.rows) == sum(trained)
    without = sum(row.elements for row in coverage.rows if row.block is None)
    assert 20 <= without and coverage.share == pytest.approx(1 - without / sum(trained))  # at least what is skipped
    assert str(coverage).count("\n") == len(coverage.rows)


def test_frozen_lazy_and_parametrized_layers_say_why_they_have_no_block():
    frozen = nn.Linear(2, 2)
    frozen.weight.requires_grad_(False)
    model = nn.Sequential(frozen, nn.Linear(2, 2), parametrizations.weight_norm(nn.Linear(2, 2)), nn.LazyLinear(2))
    said = reasons(model)
    assert "frozen" in said["0.weight"]
    assert "ParametrizationList has no block: its layer" in said["2.parametrizations.weight.original1"]
    assert "2.bias" not in said  # it shifts, whatever the weight is made of
    assert "lazy" in said["3.weight"]


def test_a_model_without_any_layer_with_a_block_is_refused_with_the_reasons():
    frozen = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)).requires_grad_(False)
    with pytest.raises(ConfigError, match=r"Sequential has no layer.*0: Linear: its weight is frozen.*1: LayerNorm"):
        planned(frozen, "kfac")
    with pytest.raises(ConfigError, match="it has no parameters"):
        planned(nn.ReLU(), "kfac")
    with pytest.raises(ConfigError, match="skipped by configuration"):
        planned(nn.Sequential(nn.Linear(2, 2)), "kfac", skip=("0",))


def test_a_weight_shared_by_two_linear_layers_has_one_block_that_measures_both():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3, bias=False))
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    plan = planned(model, "kfac")
    assert [group.name for group in plan.groups] == ["0", "2"]
    assert [row.parameter for row in plan.coverage.rows] == ["0.weight", "0.bias", "2.weight"]


def test_a_weight_shared_with_an_embedding_is_the_linear_layers():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "decoder": nn.Linear(3, 5)})
    model["decoder"].weight = model["embedding"].weight
    plan = planned(model, "kfac")
    assert [group.name for group in plan.groups] == ["decoder"]
    assert {row.parameter: row.block for row in plan.coverage.rows} == {
        "embedding.weight": "decoder",
        "decoder.bias": "decoder",
    }


def test_layers_that_share_a_weight_and_not_the_bias_have_blocks_of_their_biases():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    plan = planned(model, "kfac")
    assert {row.parameter: row.block for row in plan.coverage.rows} == {
        "0.weight": "0",
        "0.bias": "0.bias",
        "1.bias": "1.bias",
    }
    assert [group.inverter.name for group in plan.groups] == ["kfac", "unit-wise", "unit-wise"]


def test_bare_parameters_keep_to_the_table_and_to_skip():
    said = reasons(Attention(), {"encoder": "kfac"})
    assert said["scale"] == said["head.weight"] == "no pattern of the method table matches"
    assert "encoder.1.weight" not in said
    assert reasons(Attention(), skip=("scale",))["scale"] == "skipped by configuration"


def test_a_model_without_values_has_a_plan_that_nobody_can_carry_out():
    with torch.device("meta"):
        model = Attention()
    plan = planned(model, "kfac")
    assert [group.name for group in plan.groups] == [group.name for group in planned(Attention(), "kfac").groups]
    with pytest.raises(ConfigError, match="on the meta device and has no values"):
        kfdist.Preconditioner.from_plan(plan)


def test_a_layer_without_values_in_a_model_that_has_some_has_no_block():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4, device="meta"), nn.Linear(4, 2))
    said = reasons(model)
    assert said == dict.fromkeys(("1.weight", "1.bias"), "Linear: its weight is on the meta device and has no values")


def test_blocks_of_the_same_numbers_of_a_parameter_are_noted():
    model = Attention()
    assert not any(block.shares for block in planned(model, "kfac").blocks), "q, k and v are different rows of one"
    layer = model.encoder[0]
    assert isinstance(layer, nn.Linear)
    model.attention.out_proj.bias = layer.bias
    found = {block.name for block in planned(model, "kfac").blocks if block.shares}
    assert found == {"encoder.0", "attention.out_proj"}


@pytest.mark.parametrize(
    ("model", "method", "together"),
    [
        (nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 300)), "ekfac-adam", True),
        (nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 700)), "ekfac-adam", False),
        (nn.Sequential(*(nn.Linear(128, 128) for _ in range(20))), "ekfac-adam", False),
        (nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 300)), "kfac", False),
        (nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 300)), "soap", False),
        (nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), {"0": "ekfac-adam", "1": "kfac"}, False),
        (nn.Sequential(nn.Linear(64, 64)), "none", False),
    ],
)
def test_few_small_blocks_with_directions_of_adams_size_fold_at_the_same_steps(
    model: nn.Module, method: Any, together: bool
):
    assert planned(model, method).together is together


def test_a_small_model_is_measured_at_one_step_of_a_factor_period():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = kfdist.Optimizer(model, factor_period=3, inverse_period=6, adoption=kfdist.FixedLag(1))
    pipeline, measured = optimizer.preconditioner.pipeline, []
    with optimizer:
        for _ in range(13):
            measured.append(len(pipeline.timetable.requests(pipeline.next_step, calibrating=())))
            optimizer.zero_grad()
            model(torch.randn(8, 5)).square().mean().backward()
            optimizer.step()
    assert measured == [3, 0, 0] * 4 + [3]


class Tied(nn.Module):
    """A language model whose head has its table's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10, bias=False)
        self.head.weight = self.table.weight


def test_a_table_has_no_block_for_its_heads_reason_where_the_head_has_none():
    narrow, wide = (kfdist.ByWidth(eigen=4, sketched=widest) for widest in (9, 10))
    coverage = planned(Tied(), narrow).coverage
    assert {row.parameter: row.reason for row in coverage.rows if row.block is None} == {"table.weight": FIRST_ORDER}
    assert coverage.left_out() == {}, "a warning would name a block that isn't there"
    assert {row.block for row in planned(Tied(), wide).coverage.rows} == {"body", "head"}
