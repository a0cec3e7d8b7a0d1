"""Methods on gradients take any parameter of any model, without measuring a forward."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfdist
from kfdist.curvature.blocks import TensorBlock
from kfdist.errors import ConfigError, KfdistError
from tests.support.captured_methods import OF_GRADIENTS
from tests.support.optimizing import optimizer_of, small_model, train

SYNCHRONOUS: dict[str, Any] = {
    "factor_period": 1,
    "inverse_period": 1,
    "adoption": kfdist.FixedLag(0),
    "kl_clip": None,
}


class Odd(nn.Module):
    """Experts in a stack that no capture knows, attention, a norm, a tied and a normalised weight, a lone matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.Parameter(torch.randn(3, 6, 6) / 3)
        self.lone = nn.Parameter(torch.randn(6, 6) / 3)
        self.table = nn.Embedding(9, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 9)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.norm(x @ self.lone.exp() + self.normed(x))
        return self.head(torch.einsum("epq,ntq->ntp", self.experts.sin(), x))


def loss_of(model: nn.Module, seed: int) -> Tensor:
    ids = torch.randint(0, 9, (4, 5), generator=torch.Generator().manual_seed(seed))
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


@pytest.mark.parametrize("method", OF_GRADIENTS)
def test_every_matrix_and_stack_of_any_model_has_a_block(method: str) -> None:
    model = Odd()
    with kfdist.Preconditioner(model, method, **SYNCHRONOUS) as pre:
        rows = {row.parameter: row for row in pre.coverage().rows}
        wide = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
        assert {name for name, row in rows.items() if row.block == name} == wide
        assert all("a vector" in row.reason for name, row in rows.items() if name not in wide)
        assert all(isinstance(block, TensorBlock) for group in pre.groups for block in group.blocks)
        loss_of(model, 0).backward()
        before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        pre.step()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all())
            assert torch.equal(parameter.grad, before[name]) == (name not in wide), name
        assert pre.counters()["bytes"]["statistics"] == 0


@pytest.mark.parametrize("method", OF_GRADIENTS)
def test_compiled_code_is_never_made_to_run_eagerly_and_steps_are_the_same(method: str) -> None:
    torch.compiler.reset()  # how often a forward is compiled anew is counted over all tests of a process
    plain, found = Odd(), []
    for compiles in (False, True):
        model, runs = copy.deepcopy(plain), []

        def backend(graph: Any, inputs: Any, runs: list[int] = runs) -> Any:
            del inputs

            def run(*args: Any) -> Any:
                runs.append(1)
                return graph(*args)

            return run

        called: Any = torch.compile(model, backend=backend) if compiles else model
        with kfdist.Preconditioner(called, method, **SYNCHRONOUS) as pre:
            for step in range(3):
                model.zero_grad()
                before = len(runs)
                loss_of(called, step).backward()
                assert (len(runs) > before) == compiles
                pre.step()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_table_gives_each_method_its_own_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    table = {"0.weight": "shampoo", "2": "shampoo", "*": "kfac"}
    with kfdist.Preconditioner(model, table, skip=("2.bias",), **SYNCHRONOUS) as pre:
        methods = {row.parameter: row.method for row in pre.coverage().rows}
        assert methods == {
            "0.weight": "shampoo",
            "0.bias": "unit-wise",
            "2.weight": "shampoo",
            "2.bias": None,
            "3.weight": "unit-wise",
            "3.bias": "unit-wise",
            "4.weight": "kfac",
            "4.bias": "kfac",
        }
        for _ in range(2):
            model.zero_grad()
            model(torch.randn(8, 4)).square().sum(1).mean().backward()
            pre.step()
        assert set(pre.counters()["inversions"]["by_method"]) == {"shampoo", "kfac", "unit-wise"}


def few_layers() -> nn.ModuleDict:
    return nn.ModuleDict({"table": nn.Embedding(5, 4), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 3, bias=False)})


@pytest.mark.parametrize("method", OF_GRADIENTS)
@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (("table.weight",), ["head.weight"]),
        (("head.weight",), ["table.weight"]),
        (("head.weight", "norm.bias"), ["table.weight"]),
        (("*d.weight",), ["table.weight"]),
        (("table",), ["head.weight"]),
    ],
)
def test_a_parameter_is_skipped_by_its_own_name(method: str, skip: tuple[str, ...], left: list[str]) -> None:
    model = few_layers()
    with kfdist.Preconditioner(model, method, skip=skip, **SYNCHRONOUS) as pre:
        rows = {row.parameter: row for row in pre.coverage().rows}
        assert [name for name, row in rows.items() if row.block] == left
        skipped = {name for name, row in rows.items() if row.reason == "skipped by configuration"}
        assert skipped >= {"table.weight", "head.weight"} - set(left)
        assert ("norm.bias" in skipped) == ("norm.bias" in skip)
        model["head"](model["norm"](model["table"](torch.arange(5)))).square().mean().backward()
        before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        pre.step()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, before[name]) == (name not in left), name


def test_a_parameter_that_a_pattern_gives_to_gradients_is_skipped_by_its_name_and_another_is_not() -> None:
    model, table = few_layers(), {"head": "shampoo", "*": "kfac"}
    with kfdist.Preconditioner(model, table, skip=("head.weight",), **SYNCHRONOUS) as pre:
        methods = {row.parameter: row.method for row in pre.coverage().rows}
    assert (methods["head.weight"], methods["table.weight"]) == (None, "kfac-diagonal")
    with pytest.raises(ConfigError, match=r"'table.weight' matches no layer; .* single parameters: write 'table'; "):
        kfdist.Preconditioner(model, table, skip=("table.weight",), **SYNCHRONOUS)


@pytest.mark.parametrize("method", ["kfac", "ekfac-adam", kfdist.ByWidth()])
def test_a_parameters_own_name_is_refused_by_methods_on_layers_with_the_layers_name(method: Any) -> None:
    said = r"'\*.weight' matches no layer; only .* single parameters: write 'table', 'norm', 'head'; .* are 'table', "
    for skip, message in (("*.weight", said), ("head.weight", "write 'head'; "), ("head.wait", "no layer; the layers")):
        with pytest.raises(ConfigError, match=message):
            kfdist.Preconditioner(few_layers(), method, skip=skip, **SYNCHRONOUS)


def test_a_part_of_a_parameter_is_refused_with_the_parameters_name() -> None:
    model, x = nn.MultiheadAttention(6, 2), torch.randn(5, 4, 6)
    with pytest.raises(ConfigError, match=r"gives it 'q_proj', .* as in \{'in_proj_weight': 'shampoo'\}"):
        kfdist.Preconditioner(model, {"q_proj": "shampoo", "*": "kfac-eigen"}, **SYNCHRONOUS)
    with kfdist.Preconditioner(model, {"in_proj_weight": "shampoo", "*": "kfac-eigen"}, **SYNCHRONOUS) as pre:
        model(x, x, x)[0].square().mean().backward()
        pre.step()
        assert {row.parameter: row.method for row in pre.coverage().rows}["in_proj_weight"] == "shampoo"


def test_the_kl_clip_is_not_for_roots() -> None:
    model = nn.Linear(4, 3)
    found = []
    for kl_clip in (None, 1e-12):
        with kfdist.Preconditioner(model, "shampoo", **{**SYNCHRONOUS, "kl_clip": kl_clip}, lr=0.1) as pre:
            model.zero_grad()
            model(torch.ones(8, 4)).square().sum(1).mean().backward()
            pre.step()
        assert model.weight.grad is not None
        found.append(model.weight.grad.clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("method", OF_GRADIENTS)
def test_a_first_gradient_that_is_not_finite_is_no_statistic(method: str) -> None:
    model = nn.Linear(4, 3)
    with kfdist.Preconditioner(model, method, **{**SYNCHRONOUS, "factor_period": 10, "inverse_period": 100}) as pre:
        for step in range(3):
            model.zero_grad()
            model(torch.full((8, 4), torch.nan if step == 0 else 1.0)).square().sum(1).mean().backward()
            pre.step()
        assert pre.versions() == {"weight": 1}
        assert pre.counters()["nonfinite_drops"] == 1


def test_sparse_and_frozen_parameters_have_no_block_and_say_why() -> None:
    model = nn.ModuleDict(
        {"table": nn.Embedding(5, 3, sparse=True), "frozen": nn.Linear(3, 3), "head": nn.Linear(3, 2)}
    )
    model["frozen"].requires_grad_(False)
    with kfdist.Preconditioner(model, "shampoo", **SYNCHRONOUS) as pre:
        reasons = {row.parameter: row.reason for row in pre.coverage().rows if row.block is None}
    assert "sparse=False" in reasons["table.weight"] and "frozen" in reasons["frozen.weight"]


@pytest.mark.parametrize("vectors", [False, True])
def test_lazy_parameters_and_single_numbers_say_why_they_have_no_block(vectors: bool) -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    model.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
    with kfdist.Preconditioner(model, kfdist.Shampoo(vectors=vectors), **SYNCHRONOUS) as pre:
        reasons = {row.parameter: row.reason for row in pre.coverage().rows if row.block is None}
    assert "lazy and not yet initialised; run one forward" in reasons["0.weight"]
    assert "a single number" in reasons["scale"]


class BareTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 3))
        self.head = nn.Linear(3, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.embedding(ids, self.table, sparse=True))


@pytest.mark.parametrize("method", OF_GRADIENTS)
def test_sparse_gradients_of_a_bare_parameter_are_refused_by_name(method: str) -> None:
    for skip in ((), ("table",)):
        model = BareTable()
        with kfdist.Preconditioner(model, method, skip=skip, **SYNCHRONOUS) as pre:
            model(torch.tensor([1, 3])).square().sum().backward()
            if skip:
                pre.step()
                continue
            with pytest.raises(
                KfdistError, match=r"'table' has a sparse gradient, .* sparse=False, .* skip=\('table',\)"
            ):
                pre.step()
            with pytest.raises(KfdistError, match="'table' has a sparse gradient"):
                pre.groups[0].blocks[0].gradient()


@pytest.mark.parametrize("method", OF_GRADIENTS)
def test_the_optimizer_goes_on_from_its_state_to_the_bit(method: str) -> None:
    """Between two inversions, with a version under way."""
    options: dict[str, Any] = {"method": method, "inverse_period": 2, "adoption": kfdist.FixedLag(1)}
    model, other = small_model(), small_model()
    with optimizer_of(model, **options) as optimizer:
        train(model, optimizer, 3)
        weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        expected = train(model, optimizer, 4)
    with optimizer_of(other, **options) as optimizer:
        other.load_state_dict(weights)
        optimizer.load_state_dict(state)
        assert all(map(torch.equal, train(other, optimizer, 4), expected))


def test_a_state_of_another_method_or_block_size_is_refused() -> None:
    def state_of(block_size: int) -> dict[str, Any]:
        model = nn.Linear(4, 3)
        with kfdist.Preconditioner(model, kfdist.Shampoo(block_size=block_size), **SYNCHRONOUS) as pre:
            model(torch.ones(8, 4)).sum().backward()
            pre.step()
            return pre.state_dict()

    model = nn.Linear(4, 3)
    with kfdist.Preconditioner(model, "shampoo", **SYNCHRONOUS) as pre:
        with pytest.raises(kfdist.KfdistError, match="'weight' has a factor mode_"):
            pre.check_state(state_of(2))
        pre.check_state(state_of(8))
    with kfdist.Preconditioner(model, "none", **SYNCHRONOUS) as pre:
        none = pre.state_dict()
    with kfdist.Preconditioner(model, "shampoo", **SYNCHRONOUS) as pre:
        with pytest.raises(kfdist.KfdistError, match=r"lacks the groups \['weight'\]"):
            pre.check_state(none)
