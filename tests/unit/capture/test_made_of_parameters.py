"""What is made of parameters alone has one gradient for all examples, and is said; not what each example has."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfdist.capture.capture import Capture
from kfdist.capture.requests import Request, Sampling
from tests.support.factors import armed_capture, assert_factors_equal, factors_by_definition, factors_of
from tests.support.plans import planned

EXACT = 1e-12
"""float64; both sides add up the same products in another order."""

N, T, D = 3, 4, 5


class Merged(nn.Module):
    """A low-rank pair that is merged into its layer's weight, which is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(6, D), requires_grad=False)
        self.A, self.B = nn.Parameter(torch.randn(2, D)), nn.Parameter(torch.randn(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.B @ self.A)


class Scaled(Merged):
    """Does something with one of the pair first."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + (0.5 * self.B).tanh() @ self.A)


class Turned(Merged):
    """Turns a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.A @ self.weight) + self.B.sum()


class Columns(Merged):
    """Scales the columns of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.A) + self.B.sum()


@pytest.mark.parametrize("kind", [Merged, Scaled, Turned, Columns])
@pytest.mark.parametrize("examples", [N, 6], ids=["N", "as many examples as rows"])
def test_what_is_made_of_parameters_alone_is_said_and_not_measured(kind: type[Merged], examples: int):
    model = kind().double()
    blocks = {block.name: block for block in planned(model, "kfac").blocks}
    assert "A" in blocks
    capture = Capture(model, blocks, sampling=Sampling(), grad_scaler=None)
    capture.arm(dict.fromkeys(blocks, Request()))
    model(torch.randn(examples, D, dtype=torch.float64)).square().sum().div(examples).backward()
    assert capture.drain() == {}
    assert "used by an operation on parameters alone (B @ A, for W + B @ A)" in capture.unmeasured["A"]
    assert {"A", "B"} <= set(capture.unmeasured)


class Queries(nn.Module):
    """A layer that is given learned queries, which meet the examples behind it."""

    def __init__(self, given: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.queries, self.layer = nn.Parameter(torch.randn(T, D)), nn.Linear(D, D)
        self.given = given

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.given(self.queries, len(x))) * x


SPREAD: dict[str, Callable[[Tensor, int], Tensor]] = {
    "expanded": lambda queries, n: queries.expand(n, -1, -1),
    "expanded and changed": lambda queries, n: queries.unsqueeze(0).expand(n, -1, -1).sin().tanh(),
    "repeated": lambda queries, n: queries.repeat(n, 1, 1),
    "stacked": lambda queries, n: torch.stack([queries] * n),
    "added to a constant": lambda queries, n: torch.zeros(n, T, D, dtype=queries.dtype) + queries,
    "a constant like it": lambda queries, n: queries.new_ones(n, T, D),
}


def loss_of(model: nn.Module, example: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(example[0]), example[1], reduction="sum")


@pytest.mark.parametrize("given", SPREAD.values(), ids=SPREAD.keys())
def test_what_each_example_has_by_itself_is_measured(given: Callable[[Tensor, int], Tensor]):
    model = Queries(given).double()
    x, y = torch.randn(2, N, T, D, dtype=torch.float64)
    capture = armed_capture(model, names=["layer"])
    loss_of(model, (x, y)).div(N).backward()
    actual = factors_of(capture.drain())
    capture.close()
    assert not capture.unmeasured
    examples = [(x[i : i + 1], y[i : i + 1]) for i in range(N)]
    assert_factors_equal(actual, factors_by_definition(model, examples, loss_of, ["layer"]), EXACT)


def test_queries_that_all_examples_share_are_said():
    model = Queries(lambda queries, n: queries).double()
    x, y = torch.randn(2, N, T, D, dtype=torch.float64)
    capture = armed_capture(model, names=["layer"])
    loss_of(model, (x, y)).backward()
    assert capture.drain() == {}
    assert "parameters alone" in capture.unmeasured["layer"]


def test_queries_that_are_stated_to_be_the_examples_are_measured():
    """As the nodes of a graph, whose edges are all that the model is given."""
    model = Queries(lambda queries, n: queries).double()
    x, y = torch.randn(2, N, T, D, dtype=torch.float64)
    capture = armed_capture(model, names=["layer"])
    capture.state_examples(T)
    loss_of(model, (x, y)).div(T).backward()
    drained = capture.drain()["layer"]
    assert (drained.examples, drained.positions) == (T, T)


def test_of_one_example_a_sum_over_examples_is_its_gradient():
    model = Queries(lambda queries, n: queries).double()
    x, y = torch.randn(2, 1, T, D, dtype=torch.float64)
    capture = armed_capture(model, names=["layer"])
    loss_of(model, (x, y)).backward()
    actual = factors_of(capture.drain())
    capture.close()
    assert_factors_equal(actual, factors_by_definition(model, [(x, y)], loss_of, ["layer"]), EXACT)


class Codes(nn.Module):
    """Has an example for each row of a parameter, and is given nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.codes, self.layer = nn.Parameter(torch.randn(N, D)), nn.Linear(D, D)

    def forward(self) -> Tensor:
        return self.layer(self.codes)


@pytest.mark.parametrize(
    "call", [lambda model: model(), lambda model: model.layer(model.codes)], ids=["the model", "a layer by itself"]
)
def test_rows_of_a_parameter_are_the_examples_where_there_are_no_others(call: Callable[[Any], Tensor]):
    model: Any = Codes().double()
    y = torch.randn(N, D, dtype=torch.float64)
    capture = armed_capture(model, names=["layer"])
    F.mse_loss(call(model), y, reduction="sum").div(N).backward()
    actual = factors_of(capture.drain())
    capture.close()
    examples = [(model.codes.detach()[i : i + 1], y[i : i + 1]) for i in range(N)]
    layers = nn.ModuleDict({"layer": model.layer})
    expected = factors_by_definition(
        layers, examples, lambda module, each: F.mse_loss(layers["layer"](each[0]), each[1], reduction="sum"), ["layer"]
    )
    assert_factors_equal(actual, expected, EXACT)
