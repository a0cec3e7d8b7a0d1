"""Tables that are looked up by number, against the same layers as products with dense one-hot and multi-hot inputs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from kfdist.capture.capture import Capture
from kfdist.capture.requests import Request, Sampling
from kfdist.curvature.averages import BatchStatistics
from kfdist.curvature.blocks import EmbeddingBlock
from tests.support.plans import planned

N, T, V, P = 4, 5, 7, 3
IDS = torch.tensor([[0, 2, 2, 6, 1], [2, 3, 3, 3, 0], [1, 1, 6, 5, 5], [0, 0, 4, 2, 6]])
WANTED = frozenset({"A_diagonal", "G"})


def capture_of(model: nn.Module, **arguments: Any) -> Capture:
    blocks = {each.name: each for each in planned(model, "kfac").blocks if isinstance(each, EmbeddingBlock)}
    capture = Capture(model, blocks, sampling=arguments.pop("sampling", Sampling()), grad_scaler=None, **arguments)
    capture.arm(dict.fromkeys(blocks, Request(sums=WANTED)))
    return capture


def measured(model: nn.Module, *inputs: Tensor, mask: Tensor | None = None) -> BatchStatistics:
    """What was captured of the model's only table, of a batch whose loss is the mean of its examples' losses."""
    capture = capture_of(model)
    if mask is not None:
        capture.state_mask(mask)
    loss_of(model(*inputs)).div(len(inputs[0])).backward()
    drained = capture.drain()
    assert not capture.unmeasured
    capture.close()
    (found,) = drained.values()
    return found


def loss_of(y: Tensor) -> Tensor:
    """A sum over examples."""
    weight = torch.linspace(-1, 2, y[0].numel(), dtype=y.dtype).reshape(y[0].shape)
    return (y * weight).pow(2).sum() + y.sin().sum()


def truth(y_of: Callable[[Tensor], Tensor], inputs: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """diag sum a a^T and sum g g^T of y = inputs @ table for dense inputs `[..., V]`.

    Rows that are zero are none, as rows of padding are.
    """
    rows = (inputs @ table).detach().requires_grad_()
    (g,) = torch.autograd.grad(loss_of(y_of(rows)), rows)
    there = inputs.any(-1)
    return inputs[there].square().sum(0), g[there].T @ g[there]


def check(found: BatchStatistics, expected: tuple[Tensor, Tensor], rows: int) -> None:
    torch.testing.assert_close(found.sums["A_diagonal"][0], expected[0])
    torch.testing.assert_close(found.sums["G"][0], expected[1])
    assert (found.examples, float(found.positions)) == (N, rows)


class Looks(nn.Module):
    """Looks numbers up in a table in some way."""

    def __init__(self, look: Callable[..., Tensor] = lambda table, *given: table(*given), **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.look = nn.Embedding(V, P, dtype=torch.float64, **settings), look

    def forward(self, *given: Tensor) -> Tensor:
        return self.look(self.table, *given)


LOOKUPS: dict[str, Callable[..., Tensor]] = {
    "module": lambda table, ids: table(ids),
    "function": lambda table, ids: F.embedding(ids, table.weight),
    "indexed": lambda table, ids: table.weight[ids - V],
    "in place afterwards": lambda table, ids: table(ids).mul_(2.0) / 2,
}


@pytest.mark.parametrize("look", LOOKUPS.values(), ids=LOOKUPS.keys())
@pytest.mark.parametrize("ids", [IDS, IDS[:, 1], IDS[:, :4].reshape(N, 2, 2)], ids=["[N, T]", "[N]", "[N, 2, 2]"])
def test_frequencies_and_gradients(look: Callable[..., Tensor], ids: Tensor):
    model = Looks(look)
    expected = truth(lambda y: y, F.one_hot(ids, V).double(), model.table.weight)
    check(measured(model, ids), expected, ids.numel())


def test_rows_of_padding_count_for_nothing():
    model = Looks(padding_idx=2)
    inputs = F.one_hot(IDS, V).double()
    inputs[..., 2] = 0
    plain = truth(lambda y: y, F.one_hot(IDS, V).double(), model.table.weight)[1]
    model.table.weight.data[2] = 0.3  # its loss has a gradient, which torch drops
    expected = truth(lambda y: y + 0.3 * (IDS == 2).unsqueeze(-1), inputs, model.table.weight)
    check(measured(model, IDS), expected, int((IDS != 2).sum()))
    assert (expected[1] - plain).norm() > 0.01 * plain.norm()


def test_a_mask_and_padding_leave_out_rows_together():
    model, mask = Looks(padding_idx=2), torch.arange(T).expand(N, T) < 3
    model.look = lambda table, ids: table(ids) * mask.unsqueeze(-1)
    inputs = F.one_hot(IDS, V).double() * mask.unsqueeze(-1)
    inputs[..., 2] = 0
    found = measured(model, IDS, mask=mask)
    kept = int((mask & (IDS != 2)).sum())
    check(found, truth(lambda y: y * mask.unsqueeze(-1), inputs, model.table.weight), kept)


class BareTable(nn.Module):
    """Somebody's own embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(V, P, dtype=torch.float64))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight, padding_idx=2)


def test_a_bare_table():
    table = BareTable()
    model = nn.Sequential(table)
    (found,) = planned(model, "kfac").coverage.rows
    assert (found.block, found.method) == ("0", "kfac-diagonal")
    inputs = F.one_hot(IDS, V).double()
    inputs[..., 2] = 0
    expected = truth(lambda y: y, inputs, table.weight)
    check(measured(model, IDS), expected, int((IDS != 2).sum()))


class Bags(nn.Module):
    def __init__(self, mode: str, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.EmbeddingBag(V, P, mode=mode, dtype=torch.float64, **settings)

    def forward(self, *given: Tensor, padding: int | None = None) -> Tensor:
        if padding is None:
            return self.table(*given)
        return F.embedding_bag(*given, weight=self.table.weight, mode=self.table.mode, padding_idx=padding)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("form", ["matrix", "padding from the end", "offsets", "last offset"])
def test_bags_are_products_with_counts(mode: str, padding: int | None, form: str):
    model = Bags(mode, padding_idx=padding, include_last_offset=form == "last offset")
    matrix = form in ("matrix", "padding from the end")
    bags = list(IDS) if matrix else [IDS[0], IDS[1][:2], IDS[1][:0], IDS[2]]
    inputs = torch.stack([F.one_hot(bag, V).double().sum(0) for bag in bags])
    if padding is not None:
        inputs[:, padding] = 0
    if mode == "mean":
        inputs /= inputs.sum(-1, keepdim=True).clamp_min(1)
    sizes = torch.tensor([0] + [len(bag) for bag in bags]).cumsum(0)
    capture = capture_of(model)
    given = (IDS,) if matrix else (torch.cat(bags), sizes if form == "last offset" else sizes[:-1])
    if not matrix:
        capture.state_examples(N)  # dim 0 of flat numbers isn't the examples
    y = model(*given, padding=None if padding is None or form != "padding from the end" else padding - V)
    torch.testing.assert_close(y, inputs @ model.table.weight)
    loss_of(y).div(N).backward()
    found = capture.drain()["table"]
    assert not capture.unmeasured
    check(found, truth(lambda y: y, inputs, model.table.weight), int(inputs.any(-1).sum()))


POSITIONS: dict[str, Callable[[nn.Embedding, Tensor], Tensor]] = {
    "[1, T]": lambda table, x: x + table(torch.arange(T)[None]),
    "[T], on the left": lambda table, x: table(torch.arange(T)) + x,
    "a view": lambda table, x: x + table(torch.arange(T)).unsqueeze(0),
    "in place": lambda table, x: (2 * x).add_(table(torch.arange(T)[None])),
    "a slice of the weight": lambda table, x: x + table.weight[:T],
    "the weight by numbers": lambda table, x: x + table.weight[torch.arange(T)],
}


@pytest.mark.parametrize("add", POSITIONS.values(), ids=POSITIONS.keys())
@pytest.mark.parametrize("examples", [N, T, 1], ids=["N", "as many examples as positions", "one example"])
def test_positions_are_measured_where_they_meet_the_examples(
    add: Callable[[nn.Embedding, Tensor], Tensor], examples: int
):
    x = torch.randn(examples, T, P, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = Looks(add)
    base = 2 * x if add is POSITIONS["in place"] else x
    inputs = F.one_hot(torch.arange(T).expand(examples, T), V).double()
    found = measured(model, x)
    expected = truth(lambda y: base + y, inputs, model.table.weight)
    torch.testing.assert_close(found.sums["A_diagonal"][0], expected[0])
    torch.testing.assert_close(found.sums["G"][0], expected[1])
    assert found.positions == examples * T


def test_one_row_for_an_example_is_one_use_also_where_it_is_added_to_all_positions():
    x = torch.randn(N, T, P, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = Looks(lambda table, x: x + table(IDS[:, 0])[:, None])
    expected = truth(lambda y: x + y[:, None], F.one_hot(IDS[:, 0], V).double(), model.table.weight)
    check(measured(model, x), expected, N)


@pytest.mark.parametrize("examples", [N, 1])
@pytest.mark.parametrize("number", [torch.tensor(3), torch.tensor([3])], ids=["0-dim", "1-dim"])
def test_one_row_for_all_examples(number: Tensor, examples: int):
    x = torch.randn(examples, P, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = Looks(lambda table, x: x + table(number))
    found = measured(model, x)
    A, G = truth(lambda y: x + y, F.one_hot(number.expand(examples), V).double(), model.table.weight)
    torch.testing.assert_close(found.sums["A_diagonal"][0], A)
    torch.testing.assert_close(found.sums["G"][0], G)


SQUARE = torch.arange(N)[:, None] - torch.arange(N) + 3
"""As many numbers as examples along dim 0."""

SAID: dict[str, tuple[Callable[..., Tensor], str]] = {
    "a bias of attention": (
        lambda table, x: x + table(torch.arange(T)).exp().sum(-1)[:, None],
        "operations on rows that all examples share (add, exp, sum)",
    ),
    "one of as many numbers as examples": (
        lambda table, x: x[:, :N] @ x[:, :N].mT + table(SQUARE).permute(2, 0, 1).contiguous()[:1].mul(torch.ones(N)),
        "operations on rows that all examples share (add, contiguous, mul)",
    ),
    "a mask of attention": (
        lambda table, x: F.scaled_dot_product_attention(*(x[:, :N],) * 3, attn_mask=table(SQUARE)[..., 0]),
        "operations on rows that all examples share (scaled_dot_product_attention)",
    ),
    "a number for all": (
        lambda table, x: x * table(torch.tensor(2)),
        "operations on rows that all examples share (mul)",
    ),
    "flattened": (lambda table, x: x + table(IDS.flatten()).exp().view(N, T, P), "dim 0 isn't the examples"),
    "added and more": (
        lambda table, x: (lambda rows: (x + rows) * rows.exp())(table(torch.arange(T)[None])),
        "operations on rows that all examples share (exp, mul)",
    ),
    "scaled by frequency": (lambda table, x: F.embedding(IDS, table.weight, scale_grad_by_freq=True), "embedding"),
    "weighted bags": (
        lambda table, x: F.embedding_bag(IDS, table.weight, mode="sum", per_sample_weights=torch.ones(N, T).double()),
        "embedding_bag",
    ),
    "largest of bags": (lambda table, x: F.embedding_bag(IDS, table.weight, mode="max"), "embedding_bag"),
    "a product": (lambda table, x: table(IDS) + x @ table.weight.T[:, :P], "linear|matmul"),
}


@pytest.mark.parametrize(("look", "reason"), SAID.values(), ids=SAID.keys())
def test_other_uses_are_said(look: Callable[..., Tensor], reason: str):
    model = Looks(look)
    capture = capture_of(model)
    x = torch.randn(N, T, P, dtype=torch.float64)
    loss_of(model(x)).div(N).backward()
    capture.drain()
    assert any(f" {each}" in capture.unmeasured["table"] for each in reason.split("|"))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Embedding(V, P, max_norm=1.0), "max_norm = 1.0"),
        (nn.Embedding(V, P, scale_grad_by_freq=True), "scale_grad_by_freq = True"),
        (nn.EmbeddingBag(V, P, mode="max"), "mode = 'max'"),
    ],
)
def test_what_a_table_cannot_be_measured_with(module: nn.Module, reason: str):
    plan = planned(nn.Sequential(module, nn.Linear(P, P)), "kfac")
    (row,) = [row for row in plan.coverage.rows if row.parameter == "0.weight"]
    assert row.block is None
    assert reason in row.reason


def test_micro_batches_and_uneven_parts_add_up():
    model = Looks()
    whole = measured(model, IDS)
    model.zero_grad()
    capture = capture_of(model)
    for piece in (IDS[:2], IDS[2:]):
        y = model(piece)
        weight = torch.linspace(-1, 2, y[0].numel(), dtype=y.dtype).reshape(y[0].shape)
        ((y * weight).pow(2).sum() + y.sin().sum()).div(2).div(2).backward()
    parts = capture.drain()["table"]
    for name in WANTED:
        torch.testing.assert_close(parts.sums[name], whole.sums[name])
    assert (parts.examples, parts.positions) == (whole.examples, whole.positions)


def test_the_exact_fisher_of_a_table():
    model = nn.Sequential(nn.Embedding(V, P), nn.Flatten(), nn.Linear(P * T, 3)).double()
    capture = capture_of(model, fisher="exact")
    output = model(IDS)
    capture.observe(output, "cross_entropy")
    output.sum().backward()
    G = capture.drain()["0"].sums["G"][0]
    rows = model[0](IDS).detach().requires_grad_()
    logits = model[2](rows.flatten(1))
    expected = torch.zeros(P, P, dtype=torch.float64)
    for label in range(3):
        (g,) = torch.autograd.grad(F.cross_entropy(logits, torch.full((N,), label), reduction="sum"), rows,
                                   retain_graph=True)  # fmt: skip
        share = logits.softmax(-1)[:, label].detach()
        expected += torch.einsum("n,ntp,ntq->pq", share, g, g)
    torch.testing.assert_close(G, expected)


class Tied(nn.Module):
    def __init__(self, table: Any, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mix, self.head = table, nn.Linear(P, P), nn.Linear(P, V, bias=False)
        self.table.weight.data.copy_(self.head.weight.data)
        if tied:
            self.table.weight = self.head.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.table(ids)).tanh())


class TiedInCode(nn.Module):
    """No layer but the table has the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: Any = nn.ModuleDict({"table": nn.Embedding(V, P), "mix": nn.Linear(P, P)})

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner.mix(self.inner.table(ids)).tanh() @ self.inner.table.weight.T


class OneModule(nn.Module):
    """Somebody's own embedding, which is its own head."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.mix = nn.Parameter(torch.empty(V, P)), nn.Linear(P, P)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.mix(F.embedding(ids, self.weight)).tanh(), self.weight)


class NotTied(TiedInCode):
    """Its base's code has a product that isn't made."""

    @override
    def forward(self, ids: Tensor) -> Tensor:
        return self.inner.mix(self.inner.table(ids)).tanh()


def test_a_product_in_code_that_is_not_made_is_said():
    model = NotTied().double()
    (block,) = [each for each in planned(model, "kfac").blocks if each.name == "inner.table"]
    capture = Capture(model, {block.name: block}, sampling=Sampling(), grad_scaler=None)
    capture.arm({block.name: Request()})
    loss_of(model(IDS)).backward()
    assert not capture.drain()
    assert "no product with it was seen" in capture.unmeasured[block.name]
    assert capture.unseen == {block.name}


def captured(model: nn.Module, name: str) -> BatchStatistics:
    """What was captured of one of a model's blocks."""
    blocks = {each.name: each for each in planned(model, "kfac").blocks if each.name == name}
    capture = Capture(model, blocks, sampling=Sampling(), grad_scaler=None)
    capture.arm({name: Request()})
    loss_of(model(IDS)).div(N).backward()
    found = capture.drain()[name]
    assert not capture.unmeasured
    return found


@pytest.mark.parametrize("table", [partial(nn.Embedding, V, P), BareTable], ids=["module", "bare"])
def test_the_block_of_a_tied_head_is_that_of_its_product_alone(table: Callable[[], nn.Module]):
    found = {}
    for tied in (True, False):
        model = Tied(table(), tied).double()
        (row,) = [row for row in planned(model, "kfac").coverage.rows if row.parameter == "table.weight"]
        assert row.block == ("head" if tied else "table")
        assert ("enters the gradient and not the curvature" in row.reason) == tied
        found[tied] = captured(model, "head").sums
    torch.testing.assert_close(found[True], found[False])


@pytest.mark.parametrize(("kind", "table", "block"), [(TiedInCode, "inner.table", "inner.table"), (OneModule, "", "")])
def test_a_head_that_code_ties_has_the_block_too(kind: Callable[[], nn.Module], table: str, block: str):
    model, tied = kind().double(), Tied(nn.Embedding(V, P), tied=True).double()
    given = {"weight": tied.head.weight, "mix.weight": tied.mix.weight, "mix.bias": tied.mix.bias}
    for name, parameter in model.named_parameters():
        parameter.data.copy_(given[name.removeprefix("inner.").removeprefix("table.")])
    (row,) = [row for row in planned(model, "kfac").coverage.rows if row.parameter == f"{table}.weight".lstrip(".")]
    assert row.block == block and "enters the gradient and not the curvature" in row.reason
    torch.testing.assert_close(captured(model, block).sums, captured(tied, "head").sums)
