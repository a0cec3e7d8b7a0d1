"""A capture of which nothing is due rests, and goes on as if it never had."""

from torch import nn

from kfdist.capture.requests import Request
from tests.support.factors import armed_capture, assert_factors_equal, factors_of
from tests.support.small_models import images, small_cnn


def backward(model: nn.Module, seed: int = 0) -> None:
    x, y = images(8, seed=seed)
    nn.functional.cross_entropy(model(x), y).backward()


def test_a_capture_that_rested_measures_what_comes_then_and_nothing_of_before() -> None:
    model = small_cnn()
    capture = armed_capture(model)
    backward(model)
    batches = capture.drain()
    expected = factors_of(batches)
    requests = {name: Request(sums=frozenset({"A", "G"})) for name in batches}
    assert not capture.rests
    for _ in range(3):
        capture.arm({})
        capture.state_examples(3)
        backward(model, seed=1)
        assert not capture.drain()
        assert capture.rests
    x, y = images(8, seed=2)
    before = nn.functional.cross_entropy(model(x), y)
    capture.arm(requests)
    assert not capture.rests
    before.backward()
    model.zero_grad()
    backward(model)
    assert_factors_equal(factors_of(capture.drain()), expected, 1e-6)
