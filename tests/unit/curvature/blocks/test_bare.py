"""What a class's code says of its bare parameters."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfdist.curvature.blocks.bare import bare_matrices, bare_tables, held_matrices, multiplied_weights


class Uses(nn.Module):
    """Parameters in all positions."""

    straight: Tensor
    keyword: Tensor
    right: Tensor
    left: Tensor
    method: Tensor
    renamed: Tensor
    indexed: Tensor
    turned: Tensor
    summed: Tensor
    other: Tensor
    table: Tensor
    numbered: Tensor
    both: Tensor
    given: Tensor
    linear: nn.Module

    def __init__(self) -> None:
        super().__init__()
        for name in (
            "straight",
            "keyword",
            "right",
            "left",
            "method",
            "renamed",
            "indexed",
            "turned",
            "summed",
            "other",
            "table",
            "numbered",
            "both",
            "given",
        ):
            self.register_parameter(name, nn.Parameter(torch.empty(3, 4)))
        self.experts, self.heads = nn.Parameter(torch.empty(2, 3, 4)), nn.Parameter(torch.empty(3, 2, 4))
        self.stacked, self.vector = nn.Parameter(torch.empty(2, 3, 4)), nn.Parameter(torch.empty(1, 4))
        self.spread = nn.Parameter(torch.empty(2, 3, 4))

    def forward(self, x: Tensor, y: Any) -> Any:
        converted = self.renamed.to(x.dtype)
        yield F.linear(x, self.straight), nn.functional.linear(x, weight=self.keyword), F.linear(x, self.vector)
        yield x @ self.right, self.left @ x, x.matmul(self.method), torch.matmul(x, converted)
        yield torch.bmm(x, self.stacked), F.linear(x, self.indexed[y]), x @ self.turned.t(), F.linear(y, weight=y)
        yield (
            F.embedding(y, self.table),
            F.embedding(input=y, weight=self.numbered.to(x.dtype)),
            self.linear(self.given),
        )
        yield F.embedding(y, self.both), x @ self.both.T
        yield torch.einsum("btd,kd->btk", x, self.summed), F.linear(torch.exp(self.other), y)
        yield torch.einsum("ebd,edk->ebk", x, self.experts), torch.einsum("btd,dhk->bthk", x, self.heads)
        yield torch.einsum("btd,hdk->bhtk", x, self.spread)


class Inherits(Uses):
    """Its base has the code."""


def test_matrices_are_known_by_the_products_in_the_code():
    expected = dict.fromkeys(("straight", "keyword", "left", "indexed", "turned", "summed", "both"), "matrix")
    expected |= dict.fromkeys(("right", "method", "renamed", "stacked", "experts", "spread"), "transpose")
    expected |= dict.fromkeys(("table", "numbered"), "table")
    expected |= {"heads": "transpose, folded after 1"}
    assert bare_matrices(Uses()) == expected
    assert bare_matrices(Inherits()) == expected
    assert bare_tables(Inherits()) == {"table", "numbered", "both"}


@pytest.mark.parametrize("module", [nn.Bilinear(3, 4, 5), nn.LSTM(3, 4), nn.LayerNorm([3, 4])])
def test_other_parameters_are_no_matrices(module: nn.Module):
    assert bare_matrices(module) == {}


def test_a_class_without_source_has_none():
    namespace: dict[str, Any] = {"nn": nn, "torch": torch}
    exec("class Made(nn.Module):\n    def forward(self, x): return x @ self.w", namespace)
    module = namespace["Made"]()
    module.w = nn.Parameter(torch.empty(3, 4))
    assert bare_matrices(module) == {}


class Heads(nn.Module):
    """Multiplies with weights of what is inside."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: Any = nn.ModuleDict({name: nn.Embedding(3, 4) for name in ("words", "places", "unused")})

    def forward(self, x: Tensor) -> Any:
        words = self.tables.words.weight.to(x.dtype)
        yield F.linear(x, words), x @ self.tables.places.weight.t(), x @ self.tables.nowhere.weight.mT
        yield x.mT @ self.tables.unused.weight


def test_weights_of_modules_inside_are_known_by_the_products_in_the_code():
    heads = Heads()
    found = list(multiplied_weights(heads))
    assert [id(each) for each in found] == [id(heads.tables[name].weight) for name in ("words", "places")]


class Holds(nn.Module):
    """Lists and dictionaries of parameters."""

    listed: Any
    named: Any
    indexed: Any
    paired: Any
    counted: Any
    unused: Any

    def __init__(self) -> None:
        super().__init__()
        for name in ("listed", "indexed", "paired", "counted", "unused"):
            self.add_module(name, nn.ParameterList([torch.empty(3, 4), torch.empty(4)]))
        self.named = nn.ParameterDict({"first": torch.empty(3, 4)})

    def forward(self, x: Tensor) -> Any:
        yield [x @ w for w in self.listed]
        for w in self.named.values():
            yield F.linear(x, w)
        for w, _ in zip(self.paired, self.unused, strict=True):
            yield w @ x
        for i, w in enumerate(self.counted):
            for _ in range(3):
                yield x @ w.T, x @ self.indexed[i]
        for w in self.unused:
            yield x + w


def test_lists_and_dictionaries_of_parameters_are_known_by_the_code_around_them():
    holds = Holds()
    expected = {
        "listed": "transpose",
        "named": "matrix",
        "paired": "matrix",
        "counted": "matrix",
        "indexed": "transpose",
    }
    assert held_matrices(nn.Sequential(holds)) == {id(getattr(holds, name)): use for name, use in expected.items()}
