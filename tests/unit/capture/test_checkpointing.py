"""Activation checkpointing, in both of torch's ways, gives the same statistics as none."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from tests.support.factors import Factors, armed_capture, assert_factors_equal, factors_of

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of nested checkpoints

SAME = 1e-12
"""float64; checkpointing repeats the same operations, but gradients may be summed in another order."""

KINDS = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])

Segment = Callable[[nn.Module, Tensor], Tensor]


def plain(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def checkpointed(reentrant: bool) -> Segment:
    return lambda module, x: checkpoint(module, x, use_reentrant=reentrant)


class Nested(nn.Module):
    """A checkpointed segment that ends in a checkpointed segment."""

    def __init__(self, segment: Segment) -> None:
        super().__init__()
        self.segment = segment
        self.outer = nn.Linear(5, 5)
        self.inner = nn.Sequential(nn.Linear(5, 5), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.segment(self.inner, torch.tanh(self.outer(x)))


class Segmented(nn.Module):
    """Two checkpointed segments between plain layers; the first has in-place activations."""

    def __init__(self, segment: Segment) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.segment = segment
        self.stem = nn.Linear(3, 5)
        self.body = nn.Sequential(nn.Linear(5, 5), nn.ReLU(inplace=True), nn.Linear(5, 5))
        self.nested = Nested(segment)
        self.head = nn.Linear(5, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.segment(self.body, self.stem(x))
        return self.head(self.segment(self.nested, x))


def batch(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator, dtype=torch.float64), torch.randint(0, 2, (n,), generator=generator)


def measure(segment: Segment, run: Callable[[nn.Module], None]) -> Factors:
    model = Segmented(segment)
    capture = armed_capture(model)
    run(model)
    factors = factors_of(capture.drain())
    assert set(factors) == {"stem", "body.0", "body.2", "nested.outer", "nested.inner.0", "head"}
    return factors


def one_batch(model: nn.Module) -> None:
    x, y = batch(6)
    nn.functional.cross_entropy(model(x), y).backward()


def micro_batches(model: nn.Module) -> None:
    x, y = batch(8)
    for xs, ys in zip(x.chunk(4), y.chunk(4), strict=True):
        (nn.functional.cross_entropy(model(xs), ys) / 4).backward()


def two_forwards(model: nn.Module) -> None:
    """Of different length, before one backward: repeated calls must find the forward that they belong to."""
    losses = [nn.functional.cross_entropy(model(x), y) for x, y in (batch(6), batch(3, seed=1))]
    sum(losses[1:], losses[0]).backward()


def another_forward_in_between(model: nn.Module) -> None:
    """An evaluation between forward and backward must not change the number of examples."""
    x, y = batch(6)
    loss = nn.functional.cross_entropy(model(x), y)
    with torch.no_grad():
        model(batch(20)[0])
    loss.backward()


@KINDS
@pytest.mark.parametrize("run", [one_batch, micro_batches, two_forwards, another_forward_in_between])
def test_checkpointing_changes_no_statistics(run: Callable[[nn.Module], None], reentrant: bool):
    assert_factors_equal(measure(checkpointed(reentrant), run), measure(plain, run), SAME)


def test_inputs_inside_of_a_checkpoint_are_not_there_between_forward_and_backward():
    """Else a step that measures takes the memory that checkpoints are for."""
    model = Segmented(checkpointed(reentrant=False))
    there: list[StorageWeakRef] = []
    model.body[2].register_forward_pre_hook(lambda _, given: there.append(StorageWeakRef(given[0].untyped_storage())))
    capture = armed_capture(model)
    x, y = batch(6)
    loss = nn.functional.cross_entropy(model(x), y)
    assert [each.expired() for each in there] == [True]
    loss.backward()
    assert [each.expired() for each in there] == [True, True]
    assert_factors_equal(factors_of(capture.drain()), measure(plain, one_batch), SAME)


@pytest.mark.parametrize("keep", [False, True])
def test_two_backwards_through_checkpoints(keep: bool):
    def run(model: nn.Module) -> None:
        x, y = batch(6)
        output = model(x)
        (nn.functional.cross_entropy(output, y) / 4).backward(retain_graph=True)
        (nn.functional.cross_entropy(output, y) * 3 / 4).backward(retain_graph=keep)

    assert_factors_equal(measure(checkpointed(reentrant=False), run), measure(plain, one_batch), SAME)


def test_inputs_that_are_kept_elsewhere_until_the_backward():
    def run(model: nn.Module) -> None:
        with torch.autograd.graph.save_on_cpu():
            one_batch(model)

    assert_factors_equal(measure(plain, run), measure(plain, one_batch), SAME)


def test_what_autocast_has_converted_inside_of_a_checkpoint():
    def run(model: nn.Module) -> None:
        x, y = batch(6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model.float()(x.float()).float(), y)
        loss.backward()

    assert_factors_equal(measure(checkpointed(reentrant=False), run), measure(plain, run), 2e-2)


@KINDS
def test_what_a_backward_inside_a_pause_repeats_belongs_to_its_forward(reentrant: bool):
    x, y = batch(6)
    model = Segmented(checkpointed(reentrant))
    capture = armed_capture(model)
    loss = nn.functional.cross_entropy(model(x), y)
    with capture.paused():
        loss.backward()
    assert_factors_equal(factors_of(capture.drain()), measure(plain, one_batch), SAME)


@KINDS
def test_layers_that_are_only_called_by_themselves(reentrant: bool):
    """A forward before the step, repeated after it, must not hide the next one, which no call of the model begins."""
    segment = checkpointed(reentrant)
    model = Segmented(plain)
    capture = armed_capture(model)
    late = segment(model.body, torch.ones(2, 5, dtype=torch.float64, requires_grad=True)).sum()
    capture.drain()
    late.backward()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    segment(model.body, x).square().sum().div(4).backward()
    actual = factors_of(capture.drain())

    twin = Segmented(plain)
    alone = armed_capture(twin)
    twin.body(x).square().sum().div(4).backward()
    assert_factors_equal(actual, factors_of(alone.drain()), SAME)


@KINDS
def test_the_whole_model_checkpointed(reentrant: bool):
    """Reentrantly, the model itself is called again in the backward, once per micro-batch."""

    def run(model: nn.Module) -> None:
        x, y = batch(8)
        for xs, ys in zip(x.chunk(2), y.chunk(2), strict=True):
            output = checkpoint(model, xs.requires_grad_(), use_reentrant=reentrant)
            assert isinstance(output, Tensor)
            (nn.functional.cross_entropy(output, ys) / 2).backward()

    def without(model: nn.Module) -> None:
        x, y = batch(8)
        for xs, ys in zip(x.chunk(2), y.chunk(2), strict=True):
            (nn.functional.cross_entropy(model(xs), ys) / 2).backward()

    assert_factors_equal(measure(plain, run), measure(plain, without), SAME)


@pytest.mark.parametrize("whole", [False, True], ids=["segments", "whole-model"])
@KINDS
def test_paused_forwards_stay_unmeasured_when_they_are_repeated(reentrant: bool, whole: bool):
    segment = checkpointed(reentrant)
    model = Segmented(plain if whole else segment)
    capture = armed_capture(model)
    with capture.paused():
        x, y = batch(9, seed=2)
        output = segment(model, x.requires_grad_()) if whole else model(x)
    nn.functional.cross_entropy(output, y).backward()
    one_batch(model)
    assert_factors_equal(factors_of(capture.drain()), measure(plain, one_batch), SAME)


@pytest.mark.parametrize("whole", [False, True], ids=["segments", "whole-model"])
@KINDS
def test_a_forward_before_the_step_stays_dropped_when_it_is_repeated(reentrant: bool, whole: bool):
    segment = checkpointed(reentrant)
    model = Segmented(plain if whole else segment)
    capture = armed_capture(model)
    x, y = batch(9, seed=2)
    output = segment(model, x.requires_grad_()) if whole else model(x)
    capture.drain()
    nn.functional.cross_entropy(output, y).backward()
    one_batch(model)
    assert_factors_equal(factors_of(capture.drain()), measure(plain, one_batch), SAME)
