"""The names of layers lead back to them, whatever wraps the model and its parts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kfdist.curvature.blocks import ParameterPart
from kfdist.errors import ConfigError, ModelChanged
from kfdist.runtime.plan.layers import StandingBlocks, bare_model, check_blocks, device_of, find_layer, named_layers
from tests.support.factors import blocks_of
from tests.support.plans import planned
from tests.support.preconditioning import two_layers


class Module(nn.Module):
    """A model that calls its own layers as wrappers call what they wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        self.part = nn.ModuleDict({"module": nn.Linear(2, 2)})


class PassesOn(nn.Module):
    """Passes unknown attributes on to what it contains, as adapters do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.own = nn.Linear(2, 2)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)


def group_names(model: nn.Module) -> list[str]:
    return [group.name for group in planned(model, "kfac").groups]


def compiled(module: nn.Module) -> nn.Module:
    wrapped = torch.compile(module, backend="eager")
    assert isinstance(wrapped, nn.Module)
    return wrapped


def test_names_have_no_wrappers_parts_and_lead_back_to_the_layers():
    layers = [nn.Linear(2, 2) for _ in range(3)]
    model = nn.Sequential(nn.DataParallel(layers[0]), compiled(nn.Sequential(layers[1])), compiled(layers[2]))
    names = {name: module for name, module in named_layers(compiled(nn.DataParallel(model)))}
    assert list(names) == ["", "0", "1", "1.0", "2"]
    for name, layer in zip(["0", "1.0", "2"], layers, strict=True):
        assert names[name] is layer
        assert find_layer(compiled(model), name) is layer
    assert find_layer(model, "1.1") is None
    assert find_layer(model, "") is model


def test_a_users_own_module_called_module_keeps_its_name():
    assert group_names(Module()) == ["module", "part.module"]


def test_a_model_that_passes_attributes_on_is_no_wrapper():
    model = PassesOn(compiled(nn.Linear(2, 2)))
    assert bare_model(model) is model
    assert group_names(model) == ["inner", "own"]


def test_a_single_layer_is_a_model():
    assert group_names(nn.Linear(3, 2)) == [""]


def test_data_parallel_over_several_devices_is_refused():
    model = nn.DataParallel(nn.Linear(2, 2))
    model.device_ids = [0, 1]
    with pytest.raises(ConfigError, match="use DistributedDataParallel"):
        bare_model(model)


def test_a_moved_layer_is_named():
    model = two_layers()
    block = blocks_of(model)["2"]
    check_blocks(model, [block], torch.device("cpu"))
    with pytest.raises(ModelChanged, match="layer '2' was moved from cuda:0 to cpu"):
        check_blocks(model, [block], torch.device("cuda:0"))


def _replace(model: nn.Sequential) -> None:
    model[2] = nn.Linear(4, 3)


def _give_parameter(model: nn.Sequential) -> None:
    weight = model.get_parameter("2.weight")
    model[2].weight = nn.Parameter(weight.detach().clone())


def _resize(model: nn.Sequential) -> None:
    model.get_parameter("2.weight").data = torch.zeros(9, 9)


def _convert(model: nn.Sequential) -> None:
    model.get_parameter("2.bias").data = model.get_parameter("2.bias").float()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_replace, "replaced or removed"),
        (_give_parameter, "given other"),
        (_resize, "resized"),
        (_convert, "converted from torch.float64 to torch.float32"),
    ],
)
def test_what_stood_before_is_looked_at_again(change: Callable[[nn.Sequential], None], said: str):
    model = two_layers()
    standing = StandingBlocks(nn.Sequential(model), blocks_of(nn.Sequential(model)).values(), torch.device("cpu"))
    for _ in range(2):
        standing.check()
    change(model)
    for _ in range(2):
        with pytest.raises(ModelChanged, match=f"layer '0.2' was {said}"):
            standing.check()


def test_what_stands_is_not_walked_through_again(monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(two_layers())
    standing = StandingBlocks(model, blocks_of(model).values(), torch.device("cpu"))
    standing.check()
    monkeypatch.setattr("kfdist.runtime.plan.layers.check_blocks", lambda *_: pytest.fail("walked through again"))
    standing.check()


def test_what_is_frozen_stands(monkeypatch: pytest.MonkeyPatch):
    model = two_layers()
    standing = StandingBlocks(model, blocks_of(model).values(), torch.device("cpu"))
    standing.check()
    monkeypatch.setattr("kfdist.runtime.plan.layers.check_blocks", lambda *_: pytest.fail("walked through again"))
    model[2].requires_grad_(False)
    standing.check()


def test_a_bias_that_is_left_out_may_change_until_it_is_kept(monkeypatch: pytest.MonkeyPatch):
    model = two_layers()
    blocks = blocks_of(model)
    standing = StandingBlocks(model, blocks.values(), torch.device("cpu"))
    blocks["2"].keep_bias(False)
    model[2].bias = nn.Parameter(model.get_parameter("2.bias").detach().clone())
    standing.check()
    with monkeypatch.context() as patched:
        patched.setattr("kfdist.runtime.plan.layers.check_blocks", lambda *_: pytest.fail("walked through again"))
        standing.check()
    blocks["2"].keep_bias(True)
    with pytest.raises(ModelChanged, match="layer '2' was"):
        standing.check()


def test_layers_on_several_devices_are_refused():
    here, there = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.ModuleDict({"here": here, "there": there})
    blocks = [*blocks_of(model).values()]
    assert device_of(model, blocks) == torch.device("cpu")
    blocks[1].parts = (ParameterPart("weight", nn.Parameter(torch.empty(2, 2, device="meta"))),)
    with pytest.raises(ConfigError, match="'here' on cpu, 'there' on "):
        device_of(model, blocks)
