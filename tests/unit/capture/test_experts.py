"""Experts in one parameter: the truth is a twin with a layer for each, called with the rows that met it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfdist.capture.capture import Capture
from kfdist.capture.requests import Request, Sampling
from kfdist.curvature.blocks.experts import ExpertsBlock, Reach
from kfdist.curvature.references import dense_kronecker, solve_dense
from kfdist.linalg.psd import unpack_triangle
from tests.support.factors import assert_factors_equal, factors_of
from tests.support.plans import planned
from tests.support.preconditioning import preconditioner

N, T, E, Q, P = 3, 4, 5, 8, 12
"""`grouped_mm` wants rows of multiples of 16 bytes."""

ROUTES = torch.tensor([0, 3, 3, 1, 0, 0, 3, 1, 1, 3, 0, 3])
"""Of N T rows; nothing reaches 2 and 4."""

PLAIN_SUMS = frozenset({"A", "G", "a", "g"})


class Stacked(nn.Module):
    """Experts in one parameter, the way that mixtures have them, with an extra way to use them."""

    def __init__(self, use: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(E, P, Q))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        if self.use is None:
            return F.linear(x, self.experts[0])
        return self.use(x, self)


class Apart(nn.Module):
    """The same of one layer an expert."""

    def __init__(self, stacked: Stacked) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(Q, P, bias=False) for _ in range(E))
        for layer, weight in zip(self.layers, stacked.experts.detach(), strict=True):
            layer.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        y = torch.zeros(len(rows), P, dtype=x.dtype)
        for expert, layer in enumerate(self.layers):
            places = (ROUTES == expert).nonzero().flatten()
            if len(places):
                y = y.index_add(0, places, layer(rows[places]))
        return y.tanh()


def eager(x: Tensor, module: Any) -> Tensor:
    rows = x.flatten(0, 1)
    y = torch.zeros(len(rows), P, dtype=x.dtype)
    for expert in ROUTES.unique():
        places = (ROUTES == expert).nonzero().flatten()
        y = y.index_add(0, places, F.linear(rows[places], module.experts[expert]))
    return y.tanh()


def grouped(x: Tensor, module: Any) -> Tensor:
    order = ROUTES.argsort(stable=True)
    ends = ROUTES.bincount(minlength=E).cumsum(0).to(torch.int32)
    y = F.grouped_mm(x.flatten(0, 1)[order], module.experts.transpose(-2, -1), offs=ends)
    return y[order.argsort()].tanh()


def picked(x: Tensor, module: Any) -> Tensor:
    return torch.bmm(module.experts[ROUTES], x.flatten(0, 1).unsqueeze(-1)).squeeze(-1).tanh()


def picked_from_the_right(x: Tensor, module: Any) -> Tensor:
    weights = module.experts.index_select(0, ROUTES - 0)
    return torch.bmm(x.flatten(0, 1).unsqueeze(1), weights.transpose(1, 2)).squeeze(1).tanh()


USES = {"eager": eager, "grouped": grouped, "picked": picked, "picked from the right": picked_from_the_right}


def measured(model: nn.Module, x: Tensor, *, splits: int = 1, **changes: Any) -> Any:
    blocks = {block.name: block for block in planned(model, "kfac", **changes).blocks}
    capture = Capture(model, blocks, sampling=Sampling(), grad_scaler=None)
    capture.arm(dict.fromkeys(blocks, Request(sums=PLAIN_SUMS)))
    for piece in x.chunk(splits):
        model(piece).square().sum().div(len(piece) * splits).backward()
    drained = capture.drain()
    assert not capture.unmeasured
    return drained


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_each_expert_has_the_factors_of_a_layer_called_with_its_rows(use: Callable[[Tensor, Any], Tensor]):
    dtype = torch.float32 if use is grouped else torch.float64
    torch.manual_seed(0)
    model = Stacked(use).to(dtype)
    twin, x = Apart(model).to(dtype), torch.randn(N, T, Q, dtype=dtype)
    torch.testing.assert_close(model(x), twin(x))
    drained, truth = measured(model, x)["experts"], measured(twin, x)
    found, expected = factors_of({"experts": drained})["experts"], factors_of(truth)
    reached = sorted(int(name.removeprefix("layers.")) for name in truth)
    assert reached == [0, 1, 3]
    for expert in reached:
        mine = {str(expert): (found[0][expert][None], found[1][expert][None])}
        tolerance = 1e-5 if use is grouped else 1e-12
        assert_factors_equal(mine, {str(expert): expected[f"layers.{expert}"]}, tolerance)
        for part in "ag":
            torch.testing.assert_close(drained.sums[part][expert], truth[f"layers.{expert}"].sums[part][0])
        assert drained.examples[expert] == truth[f"layers.{expert}"].examples == N
        assert drained.positions[expert] == truth[f"layers.{expert}"].positions
    for expert in (2, 4):
        assert not drained.examples[expert] and not drained.positions[expert]


HOWS = ["bmm", "baddbmm", "matmul", "broadcast", "from the left", "einsum", "einsum of one", "einsum apart"]


@pytest.mark.parametrize("how", HOWS)
def test_stacks_of_matrices_that_each_meet_all_rows(how: str):
    def use(x: Tensor, module: Any) -> Tensor:
        if how == "bmm":
            return torch.bmm(x.reshape(1, -1, Q).expand(E, -1, -1), module.experts.mT).tanh().transpose(0, 1)
        if how == "baddbmm":
            added = torch.zeros(E, 1, P, dtype=x.dtype)
            rows = x.reshape(1, -1, Q).expand(E, -1, -1)
            return torch.baddbmm(added, rows, module.experts.mT, beta=0.5).tanh().transpose(0, 1)
        if how == "matmul":
            return torch.matmul(x.flatten(0, 1), module.experts.mT).tanh().transpose(0, 1)
        if how == "broadcast":
            return torch.matmul(x.unsqueeze(1), module.experts.mT).tanh()
        if how == "from the left":
            return torch.matmul(module.experts, x.unsqueeze(1).mT).mT.tanh()
        if how == "einsum of one":
            return torch.einsum("nted,epd->nept", x.unsqueeze(2), module.experts).tanh()
        if how == "einsum apart":
            return torch.einsum("ntd,edp->netp", x, module.experts.mT).tanh()
        return torch.einsum("nted,epd->nept", x.unsqueeze(2).expand(-1, -1, E, -1), module.experts).tanh()

    class All(Apart):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([layer(x) for layer in self.layers], 1).tanh()

    torch.manual_seed(0)
    model = Stacked(use).double()
    twin, x = All(model).double(), torch.randn(N, T, Q, dtype=torch.float64)
    found, expected = factors_of(measured(model, x))["experts"], factors_of(measured(twin, x))
    for expert in range(E):
        mine = {"": (found[0][expert][None], found[1][expert][None])}
        assert_factors_equal(mine, {"": expected[f"layers.{expert}"]}, 1e-12)


def test_a_stack_of_one_matrix_meets_all_rows():
    torch.manual_seed(0)
    model = Stacked(lambda x, module: torch.matmul(x, module.experts.mT).tanh()).double()
    model.experts = nn.Parameter(torch.randn(1, P, Q, dtype=torch.float64))
    twin = nn.Sequential(nn.Linear(Q, P, bias=False), nn.Tanh()).double()
    twin[0].weight = nn.Parameter(model.experts.detach()[0].clone())
    x = torch.randn(N, T, Q, dtype=torch.float64)
    torch.testing.assert_close(model(x), twin(x))
    found, expected = factors_of(measured(model, x))["experts"], factors_of(measured(twin, x))["0"]
    assert_factors_equal({"": found}, {"": expected}, 1e-12)


def test_rows_of_padding_are_left_out():
    torch.manual_seed(0)
    model, x = Stacked(eager).double(), torch.randn(N, T, Q, dtype=torch.float64)
    mask = torch.ones(N, T, dtype=torch.bool)
    mask[1, 2:] = mask[2, 1:] = False
    blocks = {block.name: block for block in planned(model, "kfac").blocks}
    capture = Capture(model, blocks, sampling=Sampling(), grad_scaler=None)
    capture.arm(dict.fromkeys(blocks, Request()))
    capture.state_mask(mask)
    model(x).square().sum(-1)[mask.flatten()].sum().div(N).backward()
    drained = capture.drain()["experts"]
    capture.close()
    for expert in range(E):
        rows = x.flatten(0, 1)[mask.flatten() & (expert == ROUTES)]
        torch.testing.assert_close(drained.sums["A"][expert], rows.mT @ rows)
        assert isinstance(drained.positions, Tensor) and drained.positions[expert] == len(rows)


def test_an_expert_that_nothing_reaches_keeps_its_average_and_the_others_are_solved_by():
    torch.manual_seed(0)
    model = Stacked(eager).double()
    with preconditioner(model, "kfac-eigen", kl_clip=None) as pre:
        averages = []
        for routes in (torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]), ROUTES):
            model.use = lambda x, module, routes=routes: torch.stack(
                [F.linear(row, module.experts[expert]) for row, expert in zip(x.flatten(0, 1), routes, strict=True)]
            ).tanh()
            model.zero_grad()
            model(torch.randn(N, T, Q, dtype=torch.float64)).square().sum().div(N).backward()
            pre.step()
            sums = pre.state_dict()["sums"]["experts"]
            averages.append(sums["A"] / sums["n_examples"][:, None])
        assert (averages[0] != 0).any(-1).all()
        torch.testing.assert_close(averages[1][[2, 4]], averages[0][[2, 4]])
        assert (averages[1][[0, 1, 3]] != averages[0][[0, 1, 3]]).any(-1).all()
        assert pre.coverage().share == 1.0


def routed_by(routes: Tensor) -> Callable[[Tensor, Any], Tensor]:
    return lambda x, module: torch.bmm(module.experts[routes], x.flatten(0, 1).unsqueeze(-1)).squeeze(-1).tanh()


@pytest.mark.parametrize("kl_clip", [None, 1e-3])
@pytest.mark.parametrize("method", ["kfac-eigen", "kfac", "rs-kfac", "sre-kfac", "eva"])
def test_an_expert_without_statistics_keeps_its_gradient(method: str, kl_clip: float | None):
    """Nothing reaches 2 and 4 before the inverse in use was made; then rows do."""
    torch.manual_seed(0)
    model = Stacked(routed_by(ROUTES)).double()
    with preconditioner(model, method, kl_clip=kl_clip, factor_period=2, inverse_period=2) as pre:
        for routes in (ROUTES, torch.arange(N * T) % E):
            model.use = routed_by(routes)
            model.zero_grad()
            model(torch.randn(N, T, Q, dtype=torch.float64)).square().sum().div(N).backward()
            assert model.experts.grad is not None
            plain = model.experts.grad.clone()
            pre.step()
        assert torch.equal(model.experts.grad[[2, 4]], plain[[2, 4]]) and plain[[2, 4]].abs().min() > 0
        assert not torch.isclose(model.experts.grad[[0, 1, 3]], plain[[0, 1, 3]]).any()
        if method == "kfac-eigen" and kl_clip is None:
            sums = pre.state_dict()["sums"]["experts"]
            A = unpack_triangle(sums["A"] / sums["n_examples"].unsqueeze(1))[[0, 1, 3]]
            G = unpack_triangle(sums["G"] / sums["n_positions"].unsqueeze(1))[[0, 1, 3]]
            truth = solve_dense(dense_kronecker(A, G), 0.1, plain[[0, 1, 3]])
            torch.testing.assert_close(model.experts.grad[[0, 1, 3]], truth)


def test_an_expert_without_statistics_has_adams_direction_beside_the_others_of_a_normalised_method():
    torch.manual_seed(0)
    model = Stacked(routed_by(ROUTES)).double()
    with preconditioner(model, "ekfac-adam", kl_clip=None, factor_period=2, inverse_period=2) as pre:
        for routes in (ROUTES, torch.arange(N * T) % E):
            model.use = routed_by(routes)
            model.zero_grad()
            model(torch.randn(N, T, Q, dtype=torch.float64)).square().sum().div(N).backward()
            assert model.experts.grad is not None
            plain = model.experts.grad.clone()
            pre.step()
    # Adam's second step with Nesterov's momentum, after a first gradient of zero.
    average, root = (0.9 * 0.1 + 0.1) / (1 - 0.9**3), (0.05 / (1 - 0.95**2)) ** 0.5
    V = plain[[2, 4]]
    torch.testing.assert_close(model.experts.grad[[2, 4]], average * V / (root * V.abs() + 1e-8))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("routes", [[2] * 7, [0, 2, 2, 2, 1, 0, 2], [1]], ids=str)
def test_rows_are_found_however_few_or_many_met_an_expert(routes: list[int], rows: int):
    torch.manual_seed(0)
    block = planned(Stacked(eager).double(), "kfac").blocks[0]
    assert isinstance(block, ExpertsBlock)
    index = torch.tensor(routes)
    a, g = (torch.randn(len(routes), rows, d, dtype=torch.float64) for d in (Q, P))
    order = index.argsort(stable=True)
    ends = torch.searchsorted(index[order], torch.arange(E), right=True)
    behind_a, behind_g = (
        torch.cat([each[order].flatten(0, 1), torch.full((2, each.shape[-1]), torch.nan)]) for each in (a, g)
    )
    for seen_a, seen_g, reach in ((a, g, Reach(index=index)), (behind_a, behind_g, Reach(ends=ends * rows))):
        sums, counts = block.routed_sums(seen_a, seen_g, reach, PLAIN_SUMS)
        for expert in range(E):
            mine = [each[index == expert].flatten(0, 1) for each in (a, g)]
            assert counts[expert] == len(mine[0])
            for name, each in zip("AG", mine, strict=True):
                torch.testing.assert_close(sums[name][expert], each.mT @ each)
                torch.testing.assert_close(sums[name.lower()][expert], each.sum(0))


@pytest.mark.parametrize("method", ["seng", "b-kfac", "ekfac", "cg-fac", "two-level"])
def test_methods_that_take_rows_of_examples_leave_experts_out_and_say_so(method: str):
    model = nn.Sequential(Stacked(eager), nn.Linear(P, P))
    rows = planned(model, method).coverage.rows
    assert [row.block for row in rows][:1] == [None] and "experts don't have" in rows[0].reason
