"""How many examples a backward's loss averages: dim 0 of the model's first tensor, unless stated."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfdist.capture.requests import Request
from kfdist.errors import ConfigError, KfdistWarning
from tests.support.factors import armed_capture, assert_factors_equal, blocks_of, factors_by_definition, factors_of
from tests.support.preconditioning import preconditioner

EXACT = 1e-12
"""float64 sums over at most 60 rows."""

N, T = 4, 5


@dataclass
class Batch:
    name: str
    tokens: Tensor
    length: int = field(init=False)  # and never set


class TokenModel(nn.Module):
    """Flattens examples and positions before its only layer, so that the layer's own dim 0 counts tokens."""

    def __init__(self, find: Callable[..., Tensor] = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.find = find
        self.layer = nn.Linear(3, 2).double()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        tokens = self.find(*args, **kwargs)
        return self.layer(tokens.flatten(0, 1)).view(*tokens.shape[:2], 2)


def tokens_and_target(n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return (
        torch.randn(n, T, 3, generator=generator, dtype=torch.float64),
        torch.randn(n, T, 2, generator=generator, dtype=torch.float64),
    )


def squared(output: Tensor, target: Tensor) -> Tensor:
    """One number per example."""
    return ((output - target) ** 2).flatten(1).sum(1)


def truth() -> dict[str, tuple[Tensor, Tensor]]:
    x, target = tokens_and_target()

    def loss(model: nn.Module, example: tuple[Tensor, Tensor]) -> Tensor:
        return squared(model(example[0][None]), example[1][None]).sum()

    return factors_by_definition(TokenModel(), list(zip(x, target, strict=True)), loss, ["layer"])


CALLS: dict[str, tuple[Callable[..., Tensor], Callable[[nn.Module, Tensor], Tensor]]] = {
    "positional": (lambda x: x, lambda model, x: model(x)),
    "by keyword": (lambda *, x: x, lambda model, x: model(x=x)),
    "after other values": (lambda flag, x: x, lambda model, x: model("train", x)),
    "after a scalar tensor": (lambda t, x: x, lambda model, x: model(torch.tensor(0.5), x)),
    "in a dict": (lambda batch: batch["x"], lambda model, x: model({"id": 7, "x": x})),
    "nested": (lambda batch: batch[1][0], lambda model, x: model([None, (x, torch.zeros(99))])),
    "in a dataclass": (lambda batch: batch.tokens, lambda model, x: model(Batch("b", x))),
}


@pytest.mark.parametrize("how", CALLS)
def test_dim_0_of_the_first_tensor(how: str):
    find, call = CALLS[how]
    model, (x, target) = TokenModel(find), tokens_and_target()
    capture = armed_capture(model)
    squared(call(model, x), target).mean().backward()
    drained = capture.drain()
    assert drained["layer"].examples == N
    assert_factors_equal(factors_of(drained), truth(), EXACT)


def test_masked_tokens_are_stated():
    """The loss averages over m unmasked tokens, so that each of them is an example with N T/m positions."""
    model, (x, target) = TokenModel(), tokens_and_target()
    mask = torch.rand(N, T, generator=torch.Generator().manual_seed(0)) < 0.6
    m = int(mask.sum())
    assert 0 < m < N * T
    capture = armed_capture(model)
    capture.state_examples(m)
    (((model(x) - target) ** 2).sum(-1) * mask).sum().div(m).backward()
    a = torch.cat([x.flatten(0, 1), torch.ones(N * T, 1, dtype=torch.float64)], dim=1)
    g = (2 * (TokenModel()(x) - target) * mask[..., None]).flatten(0, 1).detach()
    expected = {"layer": ((a.mT @ a / m)[None], (g.mT @ g / (N * T))[None])}
    assert_factors_equal(factors_of(capture.drain()), expected, EXACT)


def test_stated_per_micro_batch():
    """Micro-batches of different length, each a sum divided by its own stated number."""
    model, (x, target) = TokenModel(), tokens_and_target()
    capture = armed_capture(model)
    for part in (slice(0, 1), slice(1, 4)):
        n = part.stop - part.start
        capture.state_examples(n)
        (squared(model(x[part]), target[part]).sum() / n / 2).backward()
    drained = capture.drain()
    assert drained["layer"].examples == N
    assert_factors_equal(factors_of(drained), truth(), EXACT)


def test_a_statement_holds_for_one_backward():
    model, (x, target) = TokenModel(), tokens_and_target()
    capture = armed_capture(model)
    capture.state_examples(3)
    (squared(model(x), target).mean() / 2).backward()
    (squared(model(x), target).mean() / 2).backward()
    assert capture.drain()["layer"].examples == 3 + N


def test_a_statement_without_a_backward_ends_with_the_step():
    model, (x, target) = TokenModel(), tokens_and_target()
    capture = armed_capture(model)
    capture.state_examples(3)
    capture.drain()
    squared(model(x), target).mean().backward()
    assert capture.drain()["layer"].examples == N


def test_a_layer_called_by_itself_counts_its_own_input():
    """No stale number of an earlier call of the whole model is used."""
    model, (x, target) = TokenModel(), tokens_and_target()
    capture = armed_capture(model)
    with torch.no_grad():
        model(tokens_and_target(9)[0])
    squared(model.layer(x), target).mean().backward()
    drained = capture.drain()
    assert drained["layer"].examples == N
    assert_factors_equal(factors_of(drained), truth(), EXACT)


def test_a_layer_called_by_itself_after_a_failed_forward_counts_its_own_input():
    def fails(_: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    model, (x, target) = TokenModel(fails), tokens_and_target()
    capture = armed_capture(model)
    with pytest.raises(RuntimeError):
        model(tokens_and_target(9)[0])
    squared(model.layer(x), target).mean().backward()
    assert capture.drain()["layer"].examples == N


@pytest.mark.parametrize("good", [1, 12, np.int64(3), torch.tensor(4)])
def test_whole_numbers_are_taken(good: Any):
    model, (x, target) = TokenModel(), tokens_and_target()
    capture = armed_capture(model)
    capture.state_examples(good)
    squared(model(x), target).mean().backward()
    assert capture.drain()["layer"].examples == int(good)


@pytest.mark.parametrize("bad", [0, -1, 2.0, "3", None, True, torch.tensor(2.5)])
def test_other_values_are_refused(bad: Any):
    with pytest.raises(ConfigError, match="at least 1"):
        armed_capture(TokenModel()).state_examples(bad)


# Modules inside that are called from outside --------------------------------------------------------------------------


class Steps(nn.Module):
    """Nobody calls it as a whole, as a Lightning module's training step: it calls what is inside."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TokenModel()

    def training_step(self, x: Tensor, call: Callable[[nn.Module, Tensor], Any]) -> Tensor:
        return call(self.net, x)


CALLERS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "plain": lambda net, x: net(x),
    "reentrant": lambda net, x: checkpoint(net, x.requires_grad_(), use_reentrant=True),
    "non-reentrant": lambda net, x: checkpoint(net, x, use_reentrant=False),
}


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("how", CALLERS)
def test_a_module_that_is_called_from_outside_says_how_many_examples_there_are(how: str, k: int):
    """Its layers see rows of all tokens, which each of them by itself would take for examples."""
    model, (x, target) = Steps(), tokens_and_target()
    capture = armed_capture(model)
    for xs, ys in zip(x.chunk(k), target.chunk(k), strict=True):
        (squared(model.training_step(xs, CALLERS[how]), ys).mean() / k).backward()
    drained = capture.drain()
    assert drained["net.layer"].examples == N and not capture.doubts
    assert_factors_equal(factors_of(drained), {f"net.{name}": each for name, each in truth().items()}, EXACT)


def test_what_is_called_after_a_module_is_no_part_of_it():
    model, (x, target) = Steps(), tokens_and_target()
    capture = armed_capture(model)
    with torch.no_grad():
        model.net(tokens_and_target(9)[0])
    squared(model.net.layer(x), target).mean().backward()
    assert capture.drain()["net.layer"].examples == N


def test_a_time_first_module_that_is_called_from_outside_has_its_examples_along_dim_1():
    model = nn.ModuleDict({"net": nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)}).double()
    capture = armed_capture(model)
    model["net"](torch.randn(3, 5, 4, dtype=torch.float64)).square().sum((0, 2)).mean().backward()
    drained = capture.drain()
    assert {name: each.examples for name, each in drained.items()} == dict.fromkeys(blocks_of(model), 5)


# Objects that aren't tensors ------------------------------------------------------------------------------------------


class Graph:
    """Nodes of all graphs of a batch end to end."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.nodes = torch.randn(sum(lengths), 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class OfGraphs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 2).double()

    def forward(self, batch: Graph) -> Tensor:
        return torch.stack([graph.mean(0) for graph in self.layer(batch.nodes).split(batch.lengths)])


@pytest.mark.parametrize("stated", [None, 3])
def test_where_no_tensor_is_given_the_output_says_how_many_terms_there_are(stated: int | None):
    model, batch = OfGraphs(), Graph([2, 3, 4])
    seen: list[Tensor] = []
    model.layer.register_forward_hook(lambda layer, given, output: output.register_hook(seen.append) and None)
    capture = armed_capture(model)
    if stated is not None:
        capture.state_examples(stated)
    model(batch).square().sum(1).mean().backward()
    a, g = torch.cat([batch.nodes, torch.ones(9, 1, dtype=torch.float64)], dim=1), 3 * seen[0]
    drained = capture.drain()
    assert drained["layer"].examples == 3
    assert_factors_equal(factors_of(drained), {"layer": ((a.mT @ a / 3)[None], (g.mT @ g / 9)[None])}, EXACT)
    if stated is None:
        assert "no tensor was found" in capture.doubts[0] and "dim 0 of its output, 3, is taken" in capture.doubts[0]
    else:
        assert not capture.doubts


# Lists of images ------------------------------------------------------------------------------------------------------


class Detector(nn.Module):
    """Makes a batch of the images that it is given as a list, as torchvision's do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 2, 1).double()

    def forward(self, images: list[Tensor], targets: list[Tensor]) -> Tensor:
        del targets
        return self.layer(torch.stack(images)).flatten(1).sum(1)


def detector_step(capture: Any, model: nn.Module, *, stated: int | None = None, drains: bool = True) -> Any:
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.randn(3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(6)]
    if stated is not None:
        capture.state_examples(stated)
    model(pictures, [torch.ones(2)] * 6).mean().backward()
    return capture.drain() if drains else None


def test_a_list_of_images_is_noticed_once_and_the_remedy_named():
    model = Detector()
    with preconditioner(model, "kfac") as pre:
        with pytest.warns(KfdistWarning, match=r"list of tensors.*batch\(examples=...\)"):
            detector_step(pre.pipeline.capture, model, drains=False)
            pre.step()
        detector_step(pre.pipeline.capture, model, drains=False)
        pre.step()
        assert pre.pipeline.capture.doubts


def test_where_the_number_is_stated_a_list_of_images_is_no_news():
    model = Detector()
    capture = armed_capture(model)
    assert detector_step(capture, model, stated=6)["layer"].examples == 6 and not capture.doubts


def test_the_examples_of_a_list_of_images_are_these_whatever_the_number_of_their_channels():
    """Norms are measured, which have fewer examples than the first image has channels."""
    model = Detector()
    model.norm = nn.BatchNorm2d(2).double()
    model.layer.register_forward_hook(lambda layer, given, output: model.norm(output))
    with preconditioner(model, "kfac") as pre, pytest.warns(KfdistWarning, match="their number, 2, is taken"):
        model([torch.randn(3, 4, 4, dtype=torch.float64) for _ in range(2)], []).mean().backward()
        pre.step()
        assert pre.coverage().share == 1


@pytest.mark.parametrize("due", ["layer", "head"])
def test_the_examples_of_a_list_of_images_do_not_depend_on_what_is_due(due: str):
    """The head is given rows, which say nothing of a batch of images."""

    class Headed(Detector):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 2).double()

        def forward(self, images: list[Tensor], targets: list[Tensor]) -> Tensor:
            return self.head(self.layer(torch.stack(images)).mean((2, 3)))

    model = Headed()
    capture = armed_capture(model, names=["layer", "head"])
    capture.arm({due: Request()})
    pictures = [torch.randn(3, 4, 4, dtype=torch.float64) for _ in range(6)]
    model(pictures, []).square().sum(1).mean().backward()
    assert capture.drain()[due].examples == 6
    assert "their number, 6, is taken" in capture.doubts[0]


def test_the_noise_scale_counts_the_images_of_a_list():
    model = Detector()
    capture = armed_capture(model)
    capture.arm({}, norms=True)
    for k in (2, 5):
        (model([torch.randn(3, 4, 4, dtype=torch.float64) for _ in range(k)], []).mean() / 2).backward()
    found = capture.norms.found()
    assert found is not None and (found.count, found.inverse_examples) == (2, 1 / 2 + 1 / 5)
    capture.drain()
    assert "their number, 2, is taken" in capture.doubts[0]


@pytest.mark.parametrize("how", CALLS)
def test_other_inputs_are_no_lists_of_images(how: str):
    find, call = CALLS[how]
    model, (x, target) = TokenModel(find), tokens_and_target()
    capture = armed_capture(model)
    squared(call(model, x), target).mean().backward()
    capture.drain()
    assert not capture.doubts


def test_two_inputs_in_a_list_are_no_list_of_images():
    model, (x, target) = TokenModel(lambda both: both[0] + both[1]), tokens_and_target()
    capture = armed_capture(model)
    squared(model([x, x]), target).mean().backward()
    assert capture.drain()["layer"].examples == N and not capture.doubts


# Outputs of another number -------------------------------------------------------------------------------------------


class Texts(nn.Module):
    """Tokens of all texts end to end; the mean of each text goes on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 2).double()

    def forward(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        return self.layer(torch.stack([text.mean(0) for text in tokens.split(lengths)]))


def texts_step(capture: Any, model: nn.Module, lengths: list[int], *, stated: int | None = None) -> Any:
    tokens = torch.randn(sum(lengths), 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if stated is not None:
        capture.state_examples(stated)
    model(tokens, lengths).square().sum(1).mean().backward()
    return capture.drain()


def test_texts_end_to_end_are_noticed():
    model = Texts()
    capture = armed_capture(model)
    texts_step(capture, model, [2, 3, 4])
    assert "first input is 9 and of its output 3 " in capture.doubts[0]


def test_where_the_number_of_texts_is_stated_it_is_taken():
    model = Texts()
    capture = armed_capture(model)
    assert texts_step(capture, model, [2, 3, 4], stated=3)["layer"].examples == 3 and not capture.doubts


def test_logits_of_all_tokens_in_one_row_each_are_no_news():
    model = nn.Sequential(nn.Linear(4, 2), nn.Flatten(0, 1)).double()
    capture = armed_capture(model)
    model(torch.ones(3, 5, 4, dtype=torch.float64)).square().sum(1).mean().backward()
    assert capture.drain()["0"].examples == 3 and not capture.doubts


class Tempered(nn.Module):
    """Its first input is a number for all examples, in a tensor of one entry."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2).double()

    def forward(self, temperature: Tensor, x: Tensor) -> Tensor:
        return self.layer(x) / temperature


def test_a_first_input_without_the_examples_is_noticed():
    model, one, x = Tempered(), torch.ones(1, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    capture = armed_capture(model)
    model(one, x).square().sum(1).mean().backward()
    capture.drain()
    assert "first input is 1 and of its output 6 " in capture.doubts[0]
    assert "another input has the examples" in capture.doubts[0]
