"""The GradScaler's scale is divided out; an iteration that it skips leaves nothing behind."""

import pytest
import torch
from torch import nn

from kfdist.errors import KfdistError
from tests.support.factors import armed_capture, assert_factors_equal, factors_of
from tests.support.small_models import images, small_cnn

EXACT = 1e-12
"""float64, and the scales are powers of two."""

BF16 = 0.05
"""bfloat16 keeps 8 bits (4e-3); a few such errors meet in a Gamma entry."""


def scaler(scale: float = 1024.0) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale)


def unscaled_factors(k: int = 1):
    model, (x, y) = small_cnn(), images(8)
    capture = armed_capture(model)
    for xs, ys in zip(x.chunk(k), y.chunk(k), strict=True):
        (nn.functional.cross_entropy(model(xs), ys) / k).backward()
    return factors_of(capture.drain())


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_the_scale_is_divided_out(scale: float, k: int):
    model, (x, y), amp = small_cnn(), images(8), scaler(scale)
    capture = armed_capture(model, grad_scaler=amp)
    for xs, ys in zip(x.chunk(k), y.chunk(k), strict=True):
        amp.scale(nn.functional.cross_entropy(model(xs), ys) / k).backward()
    assert_factors_equal(factors_of(capture.drain()), unscaled_factors(), EXACT)


def test_a_disabled_scaler_scales_nothing():
    model, (x, y) = small_cnn(), images(8)
    amp = torch.amp.GradScaler("cpu", enabled=False)
    capture = armed_capture(model, grad_scaler=amp)
    amp.scale(nn.functional.cross_entropy(model(x), y)).backward()
    assert_factors_equal(factors_of(capture.drain()), unscaled_factors(), 0.0)


def test_a_scale_that_moved_is_the_one_at_the_backward():
    model, (x, y), amp = small_cnn(), images(8), scaler()
    capture = armed_capture(model, grad_scaler=amp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    amp.scale(nn.functional.cross_entropy(model(x), y)).backward()
    capture.drain()
    amp.step(optimizer)
    amp.update(new_scale=8.0)
    optimizer.zero_grad()
    amp.scale(nn.functional.cross_entropy(model(x), y)).backward()
    assert_factors_equal(factors_of(capture.drain()), unscaled_factors(), EXACT)


def test_an_iteration_that_the_scaler_skipped_is_forgotten():
    """No step of ours came between: the skipped batch neither adds rows nor counts as a micro-batch."""
    model, (x, y), amp = small_cnn(), images(8), scaler()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    capture = armed_capture(model, grad_scaler=amp)
    spoiled = x.clone()
    spoiled[0, 0, 0, 0] = torch.inf
    amp.scale(nn.functional.cross_entropy(model(spoiled), y)).backward()
    amp.step(optimizer)
    amp.update()
    assert amp.get_scale() == 512.0, "the iteration was to overflow"
    optimizer.zero_grad()
    amp.scale(nn.functional.cross_entropy(model(x), y)).backward()
    assert_factors_equal(factors_of(capture.drain()), unscaled_factors(), EXACT)


def test_an_unscaled_loss_is_an_error():
    model, (x, y) = small_cnn(), images(8)
    capture = armed_capture(model, grad_scaler=scaler())
    with pytest.raises(KfdistError, match=r"scaler\.scale\(loss\)"):
        nn.functional.cross_entropy(model(x), y).backward()
    capture.close()


def test_autocast_measures_what_the_layers_saw():
    model, (x, y) = small_cnn().float(), images(8)
    capture = armed_capture(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nn.functional.cross_entropy(model(x.float()), y)
    loss.backward()
    drained = capture.drain()
    assert all(total.dtype == torch.float32 for each in drained.values() for total in each.sums.values())
    expected = {name: (A.float(), G.float()) for name, (A, G) in unscaled_factors().items()}
    assert_factors_equal(factors_of(drained), expected, BF16)


def test_an_input_changed_in_place_under_autocast_is_an_error():
    """Autocast has saved a copy, so torch does not notice; the layer's input is no longer there to be measured."""
    model = nn.Linear(3, 2)
    capture = armed_capture(model)
    x = torch.randn(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
    x.zero_()
    with pytest.raises(KfdistError, match="changed in place"):
        output.sum().backward()
    capture.close()
