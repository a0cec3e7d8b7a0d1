"""A weight is measured where it is used, whatever function uses it; the truth is a twin made of plain layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfdist.capture.capture import Capture
from kfdist.capture.requests import Request, Sampling
from kfdist.curvature.blocks import LayerBlock
from tests.support.factors import armed_capture, assert_factors_equal, blocks_of, factors_by_definition, factors_of
from tests.support.plans import planned
from tests.support.preconditioning import preconditioner

EXACT = 1e-12
"""float64; both sides add up the same products in another order."""

N, T, D = 5, 3, 4


class Plain(nn.Module):
    """Two layers over sequences, and something between them."""

    def __init__(self, between: Callable[[nn.Linear, Tensor], Tensor] = lambda layer, x: torch.relu(layer(x))) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first, x))


class SplitAttention(nn.Module):
    """What `nn.MultiheadAttention` computes, of four plain layers."""

    def __init__(self, whole: nn.MultiheadAttention) -> None:
        super().__init__()
        width, self.heads = whole.embed_dim, whole.num_heads
        weights = (
            [whole.q_proj_weight, whole.k_proj_weight, whole.v_proj_weight]
            if whole.in_proj_weight is None
            else whole.in_proj_weight.chunk(3)
        )
        for name, weight, bias in zip("qkv", weights, whole.in_proj_bias.chunk(3), strict=True):
            layer = nn.Linear(weight.shape[1], width)
            layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
            self.add_module(f"{name}_proj", layer)
        self.out_proj = nn.Linear(width, width)
        self.out_proj.load_state_dict(whole.out_proj.state_dict())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts: Any = self
        split = [
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((parts.q_proj, q), (parts.k_proj, k), (parts.v_proj, v))
        ]
        return self.out_proj(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))


class Attends(nn.Module):
    """An attention, of either kind, to its input or to something else."""

    def __init__(self, attention: nn.Module, keys: int, values: int, *, cross: bool) -> None:
        super().__init__()
        self.attention, self.cross = attention, cross
        self.to_keys: nn.Module = nn.Linear(D, keys)
        self.to_values: nn.Module = nn.Linear(D, values)

    def forward(self, x: Tensor) -> Tensor:
        k, v = (self.to_keys(x), self.to_values(x)) if self.cross else (x, x)
        found = self.attention(x, k, v)
        return found[0] if isinstance(found, tuple) else found


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, N, T, D, dtype=torch.float64, generator=generator)
    return x, y


def compare(model: nn.Module, twin: nn.Module) -> None:
    """Asserts that a model's factors are those of its twin, whose layers have the same names."""
    model, twin = model.double().train(), twin.double().train()
    x, y = batch()
    torch.testing.assert_close(model(x), twin(x))
    blocks = {block.name: block for block in planned(model, "kfac").blocks if isinstance(block, LayerBlock)}
    capture = Capture(model, blocks, sampling=Sampling(), grad_scaler=None)
    capture.arm(dict.fromkeys(blocks, Request()))
    F.mse_loss(model(x), y, reduction="sum").div(N).backward()
    actual = factors_of(capture.drain())
    capture.close()
    examples = [(x[i : i + 1], y[i : i + 1]) for i in range(N)]
    expected = factors_by_definition(
        twin, examples, lambda module, example: F.mse_loss(module(example[0]), example[1], reduction="sum"), actual
    )
    assert_factors_equal(actual, expected, EXACT)
    assert not capture.unmeasured


def test_outputs_that_are_changed_in_place():
    """A `linear` of three dimensions ends in a view, whose node such a change replaces."""

    def in_place(layer: nn.Linear, x: Tensor) -> Tensor:
        h = layer(x)
        h += x
        h[:, 0] = 0.0
        return h.relu_()

    def out_of_place(layer: nn.Linear, x: Tensor) -> Tensor:
        mask = torch.ones(T, 1, dtype=x.dtype)
        mask[0] = 0.0
        return torch.relu((layer(x) + x) * mask)

    torch.manual_seed(0)
    model = Plain(in_place)
    twin = Plain(out_of_place)
    twin.load_state_dict(model.state_dict())
    compare(model, twin)


OTHER_USES: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "functional": lambda layer, x: F.linear(x, layer.weight, layer.bias),
    "keywords": lambda layer, x: F.linear(input=x, weight=layer.weight, bias=layer.bias),
    "in pieces": lambda layer, x: torch.cat([F.linear(each, layer.weight, layer.bias) for each in x.split(1, 1)], 1),
    "addmm": lambda layer, x: (
        torch.addmm(layer.bias, x.flatten(0, 1), layer.weight.t()).unflatten(0, (N, T)) if len(x) == N else layer(x)
    ),
    "a copied weight": lambda layer, x: F.linear(x, layer.weight.clone(), layer.bias),
    "a converted weight": lambda layer, x: F.linear(x, layer.weight.to(torch.float64), layer.bias.double()),
    "a view of a view": lambda layer, x: F.linear(x, layer.weight.view(-1).view(D, D), layer.bias[:]),
    "a view of a copied bias": lambda layer, x: F.linear(x, layer.weight, layer.bias.clone()[:]),
    "scaled afterwards": lambda layer, x: 10 * layer(x),
}


@pytest.mark.parametrize("use", OTHER_USES.values(), ids=OTHER_USES.keys())
def test_weights_that_are_used_without_calling_their_layer(use: Callable[[nn.Linear, Tensor], Tensor]):
    torch.manual_seed(0)
    model = Plain(lambda layer, x: torch.relu(use(layer, x)))
    twin = Plain(lambda layer, x: torch.relu((10 if use is OTHER_USES["scaled afterwards"] else 1) * layer(x)))
    twin.load_state_dict(model.state_dict())
    compare(model, twin)


@pytest.mark.parametrize(
    "how", ["matmul", "operator", "mm", "from the left", "batched from the left", "btd,kd->btk", "dk, ... d -> k ..."]
)
def test_products_without_a_bias(how: str):
    def use(layer: nn.Linear, x: Tensor) -> Tensor:
        M = layer.weight.mT
        if how.startswith("btd"):
            return torch.einsum(how, x, layer.weight)
        if "->" in how:
            return torch.einsum(how, [M, x]).movedim(0, -1)
        if how == "from the left":
            return (layer.weight @ x.flatten(0, 1).mT).mT.unflatten(0, x.shape[:2])
        if how == "batched from the left":
            return (layer.weight @ x.mT).mT
        if how == "matmul":
            return torch.matmul(x, M)
        return x @ M if how == "operator" else torch.mm(x.flatten(0, 1), M).unflatten(0, x.shape[:2])

    torch.manual_seed(0)
    model, twin = Plain(use), Plain(lambda layer, x: layer(x))
    for each in (model, twin):
        each.first = nn.Linear(D, D, bias=False)
    twin.load_state_dict(model.state_dict())
    compare(model, twin)


BIASES_APART: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "plus": lambda layer, x: x @ layer.weight.mT + layer.bias,
    "in front": lambda layer, x: torch.add(input=layer.bias, other=x @ layer.weight.mT),
    "in place": lambda layer, x: F.linear(x, layer.weight).add_(layer.bias.double()),
    "along rows": lambda layer, x: (layer.weight @ x.mT + layer.bias.view(-1, 1)).mT,
    "with dimensions": lambda layer, x: x.matmul(layer.weight.t()) + layer.bias[None, None],
}


@pytest.mark.parametrize("use", BIASES_APART.values(), ids=BIASES_APART.keys())
def test_biases_that_are_added_apart_from_the_product(use: Callable[[nn.Linear, Tensor], Tensor]):
    torch.manual_seed(0)
    model, twin = Plain(use), Plain(lambda layer, x: layer(x))
    twin.load_state_dict(model.state_dict())
    compare(model, twin)


def masked_bias(layer: nn.Linear) -> Tensor:
    bias = layer.bias.clone()
    bias[1:].zero_()
    return bias


NOT_THE_BIAS: dict[str, tuple[Callable[[nn.Linear, Tensor], Tensor], str]] = {
    "another one": (lambda layer, x: F.linear(x, layer.weight, masked_bias(layer)), "linear"),
    "none": (lambda layer, x: F.linear(x, layer.weight), "nothing that was seen"),
    "a multiple": (lambda layer, x: torch.add(x @ layer.weight.mT, layer.bias, alpha=2), "add"),
    "to something else": (lambda layer, x: F.linear(x, layer.weight).mul_(2) + layer.bias, "add"),
    "along the wrong dimension": (
        lambda layer, x: F.linear(x[:, [0, 1, 2, 2]], layer.weight) + layer.bias[:, None],
        "add",
    ),
}


@pytest.mark.parametrize(("use", "by"), NOT_THE_BIAS.values(), ids=NOT_THE_BIAS.keys())
def test_a_weight_that_is_used_without_its_bias_is_measured_alone(use: Callable[[nn.Linear, Tensor], Tensor], by: str):
    """As a layer is whose bias is frozen, so that its block was planned without it."""
    torch.manual_seed(0)
    model, twin = Plain(use).double(), Plain(use).double()
    twin.load_state_dict(model.state_dict())
    twin.first.bias.requires_grad_(False)
    found = []
    for each in (model, twin):
        blocks = blocks_of(each)
        capture = Capture(each, blocks, sampling=Sampling(), grad_scaler=None)
        capture.arm(dict.fromkeys(blocks, Request(samples=N)))
        each(batch()[0]).square().sum().backward()
        found.append((blocks["first"], capture.drain()["first"], capture.biases))
        capture.biases.settle(capture.biases.seen)
    (block, mine, biases), (alone, truth, _) = found
    assert by in biases.left_out["first"]
    assert_factors_equal(
        {"first": (mine.sums["A"][..., :-1, :-1], mine.sums["G"])},
        {"first": (truth.sums["A"], truth.sums["G"])},
        EXACT,
    )
    assert mine.samples is not None
    assert not mine.sums["A"][..., -1].any() and not mine.samples.a[..., -1].any()
    assert block.parameters() == [model.first.weight]
    torch.testing.assert_close(block.gradient(), F.pad(alone.gradient(), (0, 1)))
    bias = model.first.bias.grad
    block.write_gradient(torch.ones_like(block.gradient()))
    assert model.first.bias.grad is bias and (model.first.weight.grad == 1).all()


def test_a_forward_that_is_replaced_and_a_hook_that_changes_the_output():
    torch.manual_seed(0)
    model = Plain()
    twin = Plain(lambda layer, x: torch.relu(10 * layer(x) + 1))
    twin.load_state_dict(model.state_dict())
    layer: Any = model.first
    original = layer.forward
    layer.forward = lambda x: 10 * original(x)
    layer.register_forward_hook(lambda _module, _args, output: output + 1)
    compare(model, twin)


@pytest.mark.parametrize(
    ("arguments", "cross"),
    [({}, False), ({}, True), ({"kdim": 3, "vdim": 2}, True), ({"add_zero_attn": False}, False)],
    ids=["packed", "packed, to others", "apart", "batch first"],
)
def test_attention_has_blocks_of_its_projections(arguments: dict[str, Any], cross: bool):
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(D, 2, batch_first=True, **arguments)
    nn.init.normal_(whole.in_proj_bias)
    keys, values = arguments.get("kdim", D), arguments.get("vdim", D)
    model = Attends(whole, keys, values, cross=cross)
    twin = Attends(SplitAttention(whole), keys, values, cross=cross)
    twin.load_state_dict(model.state_dict(), strict=False)
    if not cross:
        for each in (model, twin):
            each.to_keys = each.to_values = nn.Identity()
    compare(model, twin)


class Router(nn.Module):
    """Has a bare weight and a bare projection, as routers and models do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.randn(D))
        self.projection, self.scale = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.projection.to(x.dtype)
        return F.linear(x, self.weight, self.bias).tanh() @ matrix + self.scale[:T]


class Routed(nn.Module):
    """A model with a router in it, or with the layers that it stands for."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, x: Tensor) -> Tensor:
        parts: Any = self.router
        return parts(x) if isinstance(parts, Router) else parts.projection(parts(x).tanh()) + parts.scale[:T]


def test_bare_matrices_that_a_module_multiplies_with():
    torch.manual_seed(0)
    router, layers = Router(), nn.Linear(D, D)
    layers.weight, layers.bias = router.weight, router.bias
    layers.register_buffer("scale", router.scale.detach().double())
    layers.projection = nn.Linear(D, D, bias=False)
    layers.projection.weight = nn.Parameter(router.projection.detach().t().clone())
    compare(Routed(router), Routed(layers))


class Listed(nn.Module):
    """Matrices out of a list and a dictionary, or the layers that they make."""

    def __init__(self, twin: "Listed | None" = None) -> None:
        super().__init__()
        self.alike = twin is not None
        if twin is None:
            self.inner: Any = nn.ParameterList([torch.randn(D, D), torch.randn(D, D)])
            self.outer: Any = nn.ParameterDict({"last": torch.randn(D, D)})
            return
        self.inner, self.outer = nn.Module(), nn.Module()
        for name, weight in twin.named_parameters():
            holder, label = name.split(".")
            layer = nn.Linear(D, D, bias=False)
            layer.weight = nn.Parameter(weight.detach() if holder == "outer" else weight.detach().T.clone())
            self.get_submodule(holder).add_module(label, layer)

    def forward(self, x: Tensor) -> Tensor:
        if self.alike:
            for layer in self.inner.children():
                x = layer(x).tanh()
            return self.outer.last(x)
        for weight in self.inner:
            x = (x @ weight).tanh()
        return F.linear(x, self.outer["last"])


def test_matrices_out_of_lists_and_dictionaries():
    torch.manual_seed(0)
    model = Listed()
    compare(model, Listed(model))


class Folded(nn.Module):
    """Projections to and from heads whose matrices have three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Parameter(torch.randn(D, 2, 3)), nn.Parameter(torch.randn(2, 3, D))
        self.v, self.o = nn.Parameter(torch.randn(2, 3, D)), nn.Parameter(torch.randn(D, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        q = torch.einsum("ibh,hnd->bind", x.transpose(0, 1), self.q)
        k = torch.einsum("...h,ndh->...nd", x, self.k).tanh()
        y = torch.einsum("btnd,ndh->bth", q * k, self.v)
        return torch.einsum("bhtk,dhk->btd", torch.einsum("bth,ndh->bntd", y, self.k), self.o)


class Unfolded(nn.Module):
    """The same of plain layers."""

    def __init__(self, folded: Folded) -> None:
        super().__init__()
        weights = {"q": folded.q.flatten(1).T, "k": folded.k.flatten(0, 1), "v": folded.v.flatten(0, 1).T,
                   "o": folded.o.flatten(1)}  # fmt: skip
        for name, weight in weights.items():
            layer = nn.Linear(*weight.T.shape, bias=False)
            layer.weight = nn.Parameter(weight.detach().clone())
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        parts: Any = self
        return parts.o(parts.k(parts.v(parts.q(x) * parts.k(x).tanh())))


def test_matrices_of_three_dimensions_are_folded():
    torch.manual_seed(0)
    model = Folded()
    compare(model, Unfolded(model))


def test_directions_of_folded_matrices_are_those_of_plain_ones():
    torch.manual_seed(0)
    model = Folded().double()
    twin, (x, y) = Unfolded(model).double(), batch()
    found = []
    for each in (model, twin):
        with preconditioner(each, "kfac") as pre:
            F.mse_loss(each(x), y).backward()
            if each is model:  # also where a gradient isn't laid out as its parameter
                assert model.q.grad is not None
                model.q.grad = model.q.grad.transpose(0, 2).contiguous().transpose(0, 2)
            pre.step()
            directions = pre.directions(0.1)
        found.append(({name: p.grad for name, p in each.named_parameters()}, list(directions.values())))
    for (name, mine), other in zip(found[0][0].items(), found[1][0].values(), strict=True):
        assert mine is not None and other is not None
        torch.testing.assert_close(mine.flatten(), (other.T if name in "qv" else other).flatten())
    assert [each.shape for each in found[0][1]] == [each.shape for each in model.parameters()]


def test_weights_that_are_stored_transposed():
    """The class is known by its full name, since the library it is from isn't needed here."""

    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(D, D + 1)), nn.Parameter(torch.randn(D + 1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x.view(-1, D), self.weight).view(*x.shape[:-1], D + 1)

    Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"
    transposed: Any = Conv1D()
    model, layer = nn.Sequential(transposed, nn.Tanh(), nn.Linear(D + 1, D)), nn.Linear(D, D + 1)
    layer.weight, layer.bias = nn.Parameter(transposed.weight.detach().t().clone()), transposed.bias
    compare(model, nn.Sequential(layer, nn.Tanh(), model[2]))


def test_a_weight_that_layers_with_other_biases_share():
    """Both uses add up in a block of the weight alone."""

    class Tied(nn.Module):
        def __init__(self, *, alike: bool) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=not alike)
            self.second.weight = self.first.weight
            self.bias = torch.ones(D, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x))
            return self.second(h) if self.second.bias is not None else self.first(h) + self.bias

    model, twin = Tied(alike=False), Tied(alike=True)
    nn.init.ones_(model.second.bias)
    twin.first.load_state_dict(model.first.state_dict())
    compare(model, twin)


@pytest.mark.parametrize("equation", ["ntd,ed->ne", "ntd,ed->etd", "ntd,ed->nt"])
def test_what_uses_a_weight_besides_is_remembered(equation: str):
    torch.manual_seed(0)
    model = Plain(lambda layer, x: layer(x) + torch.einsum(equation, x, layer.weight).sum()).double()
    capture = armed_capture(model)
    x, y = batch()
    F.mse_loss(model(x), y).backward()
    assert set(capture.drain()) == {"first", "second"}
    assert capture.unmeasured == {"first": "it is also used by einsum, which can't be measured"}


def test_a_weight_that_is_used_in_pieces_is_not_measured_and_that_is_said():
    torch.manual_seed(0)
    pieces = lambda layer, x: torch.cat([F.linear(x, each) for each in layer.weight.split(2)], -1) + layer.bias  # noqa: E731
    model = Plain(pieces).double()
    capture = armed_capture(model)
    x, y = batch()
    F.mse_loss(model(x), y).backward()
    assert set(capture.drain()) == {"second"}
    assert capture.unmeasured == {"first": "it is used by add, linear, which can't be measured"}


def doubled(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    weight = layer.weight.clone()
    weight *= 2
    return weight, layer.bias


def masked(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    weight = layer.weight.clone()
    weight[0] = 0.0
    return weight, layer.bias


def repeated(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    return layer.weight[:1].expand(D, D), layer.bias


@pytest.mark.parametrize("parameters", [doubled, masked, repeated])
def test_what_only_looks_like_a_weight_is_not_taken_for_it(
    parameters: Callable[[nn.Linear], tuple[Tensor, Tensor]],
):
    torch.manual_seed(0)
    model = Plain(lambda layer, x: F.linear(x, *parameters(layer))).double()
    capture = armed_capture(model)
    x, y = batch()
    F.mse_loss(model(x), y).backward()
    assert set(capture.drain()) == {"second"}
    assert capture.unmeasured == {"first": "it is used by linear, which can't be measured"}
