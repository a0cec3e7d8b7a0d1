"""Which layers form a chain, and what is said of those that don't."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from kfdist.curvature.chains import chain_refusal


def linear(d_in: int = 4, d_out: int = 4) -> nn.Linear:
    return nn.Linear(d_in, d_out)


class OwnForward(nn.Module):
    def __init__(self, *between: nn.Module) -> None:
        super().__init__()
        self.first = linear()
        for place, module in enumerate(between):
            self.add_module(f"between{place}", module)
        self.last = linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


class Reversed(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        for module in reversed(list(self)):
            input = module(input)
        return input


def nested() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.LayerNorm(4),
        nn.Sequential(linear(), nn.ReLU(), nn.Dropout(0.1)),
        nn.Sequential(nn.Identity(), nn.Sequential(linear(), nn.Tanh())),
        linear(),
        nn.Softmax(-1),
    )


def test_trees_of_sequentials_are_chains() -> None:
    assert chain_refusal(nested(), ["2.0", "3.1.0", "4"]) == ""
    assert chain_refusal(nested(), ["2.0", "3.1.0"]) == ""
    named = nn.Sequential(OrderedDict(body=nested(), head=nn.Sequential(nn.Linear(4, 2))))
    assert chain_refusal(named, ["body.2.0", "body.3.1.0", "body.4"]) == ""
    assert "'body.5' (Softmax)" in chain_refusal(named, ["body.4", "head.0"])


def test_one_layer_is_a_chain_wherever_it_is() -> None:
    assert chain_refusal(OwnForward(), ["last"]) == ""
    assert "needs at least one layer" in chain_refusal(OwnForward(), [])


def test_a_part_may_be_a_chain_in_a_model_that_is_none() -> None:
    model = OwnForward(nn.Sequential(linear(), nn.ReLU(), linear()))
    assert chain_refusal(model, ["between0.0", "between0.2"]) == ""
    assert "forward of its own" in chain_refusal(model, ["first", "between0.0"])


@pytest.mark.parametrize(
    "module",
    [nn.BatchNorm1d(4), nn.LayerNorm(4), nn.PReLU(), nn.GLU(), nn.Flatten(), nn.Softmax(-1), linear(), OwnForward()],
    ids=lambda module: type(module).__name__,
)
@pytest.mark.parametrize("own_forward", [False, True])
def test_what_may_not_stand_between(module: nn.Module, own_forward: bool) -> None:
    model = OwnForward(nn.ReLU(), module) if own_forward else nn.Sequential(linear(), nn.ReLU(), module, linear())
    names = ["first", "last"] if own_forward else ["0", "3"]
    found = chain_refusal(model, names, assume_chain=own_forward)
    assert f"({type(module).__name__}) stands between the layers" in found
    assert "give them `kfac`" in found


@pytest.mark.parametrize("module", [nn.ReLU(), nn.GELU(), nn.ReLU6(), nn.Dropout(0.5), nn.Identity()])
def test_what_may_stand_between(module: nn.Module) -> None:
    assert chain_refusal(nn.Sequential(linear(), module, linear()), ["0", "2"]) == ""


def test_a_forward_of_ones_own_needs_a_voucher() -> None:
    model = OwnForward(nn.ReLU())
    found = chain_refusal(model, ["first", "last"])
    assert "'the model' (OwnForward) has a forward of its own" in found and "assume_chain = true" in found
    assert chain_refusal(model, ["first", "last"], assume_chain=True) == ""
    listed = nn.Module()
    listed.add_module("layers", nn.ModuleList([linear(), linear()]))
    assert "'layers' (ModuleList)" in chain_refusal(listed, ["layers.0", "layers.1"])
    assert chain_refusal(listed, ["layers.0", "layers.1"], assume_chain=True) == ""


def test_a_sequential_with_another_forward_is_not_trusted() -> None:
    assert "(Reversed) has a forward of its own" in chain_refusal(Reversed(linear(), linear()), ["0", "1"])


def test_the_order_is_that_of_the_model() -> None:
    model = nn.Sequential(linear(), linear(), linear())
    assert "run in the order 0, 1, 2, the chain is 1, 0, 2" in chain_refusal(model, ["1", "0", "2"])


def test_a_layer_used_twice_has_no_place() -> None:
    shared = linear()
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), linear())
    assert "'2' is used twice" in chain_refusal(model, ["0", "4"])


def test_other_layers_are_refused() -> None:
    assert "'0' is a Conv2d" in chain_refusal(nn.Sequential(nn.Conv2d(1, 1, 1), linear()), ["0", "1"])
    with pytest.raises(ValueError, match="no module 'missing'"):
        chain_refusal(nn.Sequential(linear()), ["missing"])
