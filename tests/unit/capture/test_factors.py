"""What is measured equals the factors' definition, however the batch is cut into forwards and backwards."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.factors import armed_capture, assert_factors_equal, factors_by_definition, factors_of
from tests.support.small_models import images, small_cnn

EXACT = 1e-12
"""float64 sums over at most 200 rows, in another order: a few units of 1e-16 times their number."""

CNN_LAYERS = ["0", "2", "5", "7"]


def sequence_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 2)).double()


class CalledTwice(nn.Module):
    """One layer at two places, and one that only some batches use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.shared = nn.Linear(4, 4).double()
        self.optional = nn.Linear(4, 4).double()
        self.head = nn.Linear(4, 2).double()

    def forward(self, x: Tensor, *, with_optional: bool = False) -> Tensor:
        x = torch.tanh(self.shared(x))
        x = torch.tanh(self.shared(x))
        return self.head(torch.tanh(self.optional(x)) if with_optional else x)


def cnn_loss(model: nn.Module, example: tuple[Tensor, Tensor]) -> Tensor:
    x, y = example
    return nn.functional.cross_entropy(model(x[None]), y[None])


def cnn_truth(n: int = 8) -> dict[str, tuple[Tensor, Tensor]]:
    x, y = images(n)
    return factors_by_definition(small_cnn(), list(zip(x, y, strict=True)), cnn_loss, CNN_LAYERS)


def test_convolutions_and_linear_layers_equal_their_definition():
    model, (x, y) = small_cnn(), images(8)
    capture = armed_capture(model)
    nn.functional.cross_entropy(model(x), y).backward()
    assert_factors_equal(factors_of(capture.drain()), cnn_truth(), EXACT)


def test_positions_of_a_sequence_share_the_weight():
    model = sequence_model()
    x, target = torch.randn(6, 7, 3).double(), torch.randn(6, 7, 2).double()

    def loss(model: nn.Module, example: tuple[Tensor, Tensor]) -> Tensor:
        return ((model(example[0][None]) - example[1]) ** 2).sum()

    expected = factors_by_definition(model, list(zip(x, target, strict=True)), loss, ["0", "2", "4"])
    capture = armed_capture(model)
    ((model(x) - target) ** 2).sum(dim=(1, 2)).mean().backward()
    assert_factors_equal(factors_of(capture.drain()), expected, EXACT)


def test_a_layer_called_twice_in_one_forward_counts_its_examples_once():
    model = CalledTwice()
    x, y = torch.randn(5, 4).double(), torch.randint(0, 2, (5,))
    expected = factors_by_definition(model, list(zip(x, y, strict=True)), cnn_loss, ["shared", "head"])
    capture = armed_capture(model)
    nn.functional.cross_entropy(model(x), y).backward()
    assert_factors_equal(factors_of(capture.drain()), expected, EXACT)


def test_a_tied_layer_adds_its_calls():
    torch.manual_seed(3)
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    twice = CalledTwice()
    twice.shared, twice.head = model[0], model[4]
    x, y = torch.randn(5, 4).double(), torch.randint(0, 2, (5,))
    expected = factors_by_definition(twice, list(zip(x, y, strict=True)), cnn_loss, ["shared", "head"])
    capture = armed_capture(model, names=["0", "4"])
    nn.functional.cross_entropy(model(x), y).backward()
    actual = factors_of(capture.drain())
    assert_factors_equal({"shared": actual["0"], "head": actual["4"]}, expected, EXACT)


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_micro_batches_of_the_loss_over_k_equal_the_whole_batch(k: int):
    model, (x, y) = small_cnn(), images(8)
    capture = armed_capture(model)
    for xs, ys in zip(x.chunk(k), y.chunk(k), strict=True):
        (nn.functional.cross_entropy(model(xs), ys) / k).backward()
    assert_factors_equal(factors_of(capture.drain()), cnn_truth(), EXACT)


def test_a_micro_batch_that_uses_no_due_layer_still_counts_in_k():
    model = CalledTwice()
    capture = armed_capture(model, names=["optional"])
    x, y = torch.randn(6, 4).double(), torch.randint(0, 2, (6,))
    expected = factors_by_definition(
        model,
        list(zip(x[:3], y[:3], strict=True)),
        lambda model, example: nn.functional.cross_entropy(
            model(example[0][None], with_optional=True), example[1][None]
        ),
        ["optional"],
    )
    capture.drain()
    for part, with_optional in ((slice(0, 3), True), (slice(3, 6), False)):
        (nn.functional.cross_entropy(model(x[part], with_optional=with_optional), y[part]) / 2).backward()
    assert_factors_equal(factors_of(capture.drain()), expected, EXACT)


def test_a_layer_without_a_call_has_no_statistics():
    model = CalledTwice()
    capture = armed_capture(model)
    nn.functional.cross_entropy(model(torch.randn(3, 4).double()), torch.tensor([0, 1, 0])).backward()
    assert set(capture.drain()) == {"shared", "head"}


def test_in_place_activations_change_nothing():
    x, y = images(8)
    measured = []
    for inplace in (False, True):
        model: Any = small_cnn()
        for index in (1, 3, 6):
            model[index] = nn.ReLU(inplace=inplace)
        capture = armed_capture(model)
        nn.functional.cross_entropy(model(x), y).backward()
        measured.append(factors_of(capture.drain()))
    assert_factors_equal(measured[1], measured[0], 0.0)


def test_clipping_gradients_changes_no_statistics():
    model, (x, y) = small_cnn(), images(8)
    capture = armed_capture(model)
    nn.functional.cross_entropy(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
    assert_factors_equal(factors_of(capture.drain()), cnn_truth(), EXACT)
