"""When `observe` measures, when it doesn't, and that it leaves no trace in the gradients."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kfdist.capture.capture import Capture
from kfdist.capture.requests import Request, Sampling
from kfdist.curvature.blocks import LayerBlock
from kfdist.errors import ConfigError, KfdistError
from tests.support.factors import Factors, armed_capture, assert_factors_equal, blocks_of, factors_of
from tests.support.small_models import images, small_cnn

SAME = 1e-12
"""float64; the same operations, added up in another order."""

EXACT_AND_MC = pytest.mark.parametrize("fisher", ["exact", "mc"])


def alone(n: int = 8, seed: int = 0, fisher: str = "exact") -> Factors:
    """The factors of one observed batch, without a backward."""
    model = small_cnn()
    capture = armed_capture(model, fisher=fisher)
    capture.observe(model(images(n, seed=seed)[0]), "cross_entropy")
    return factors_of(capture.drain())


def train(model: nn.Module, capture: Capture, n: int = 8, seed: int = 0, *, divided: int = 1) -> None:
    x, y = images(n, seed=seed)
    output = model(x)
    capture.observe(output, "cross_entropy")
    (F.cross_entropy(output, y) / divided).backward()


@EXACT_AND_MC
def test_the_loss_s_backward_adds_nothing(fisher: str):
    model = small_cnn()
    capture = armed_capture(model, fisher=fisher)
    train(model, capture)
    assert_factors_equal(factors_of(capture.drain()), alone(fisher=fisher), 0.0)


@EXACT_AND_MC
def test_gradients_are_those_without_it(fisher: str):
    model, twin = small_cnn(), small_cnn()
    capture = armed_capture(model, fisher=fisher)
    x, y = images(8)
    output = model(x)
    capture.observe(output, "cross_entropy")
    assert all(parameter.grad is None for parameter in model.parameters())
    F.cross_entropy(output, y).backward()
    F.cross_entropy(twin(x), y).backward()
    for mine, plain in zip(model.parameters(), twin.parameters(), strict=True):
        assert mine.grad is not None and plain.grad is not None
        assert torch.equal(mine.grad, plain.grad)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_micro_batches_equal_the_whole_batch(k: int):
    model = small_cnn()
    capture = armed_capture(model, fisher="exact")
    x, y = images(8)
    for xs, ys in zip(x.chunk(k), y.chunk(k), strict=True):
        output = model(xs)
        capture.observe(output, "cross_entropy")
        (F.cross_entropy(output, ys) / k).backward()
    drained = capture.drain()
    assert all(each.examples == 8 for each in drained.values())
    assert_factors_equal(factors_of(drained), alone(), SAME)


def test_all_forwards_may_come_before_all_backwards():
    model = small_cnn()
    capture = armed_capture(model, fisher="exact")
    x, y = images(8)
    outputs = [model(xs) for xs in x.chunk(2)]
    for output in outputs:
        capture.observe(output, "cross_entropy")
    for output, ys in zip(outputs, y.chunk(2), strict=True):
        (F.cross_entropy(output, ys) / 2).backward()
    assert_factors_equal(factors_of(capture.drain()), alone(), SAME)


def test_a_stated_number_of_terms_cancels_in_the_product():
    """Omega and Gamma split N differently; their product is the Hessian, whatever N is said to be."""
    model, (x, y) = small_cnn(), images(8)
    capture = armed_capture(model, fisher="exact")
    capture.state_examples(3)
    output = model(x)
    capture.observe(output, "cross_entropy")
    F.cross_entropy(output, y).backward()
    drained = capture.drain()
    assert drained["5"].examples == 3
    for name, (A, G) in alone().items():
        mine = factors_of(drained)[name]
        torch.testing.assert_close(mine[0] * 3, A * 8)
        torch.testing.assert_close(mine[1] / 3, G / 8)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.body(x))
        return self.left(hidden), self.right(hidden)


def test_heads_add_up():
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()

    def measure(*heads: str) -> Factors:
        model = TwoHeads()
        capture = armed_capture(model, fisher="exact")
        left, right = model(x)
        if "left" in heads:
            capture.observe(left, "cross_entropy")
        if "right" in heads:
            capture.observe(right, "mse", reduction="sum")
        return factors_of(capture.drain())

    left, right, both = measure("left"), measure("right"), measure("left", "right")
    assert set(left) == {"body", "left"}
    expected = {**left, **right, "body": (left["body"][0], left["body"][1] + right["body"][1])}
    assert_factors_equal(both, expected, SAME)


def test_a_head_that_was_not_observed_is_told():
    model = TwoHeads()
    capture = armed_capture(model, fisher="mc")
    left, right = model(torch.ones(2, 3).double())
    capture.observe(left, "cross_entropy")
    (left.sum() + right.sum()).backward()
    with pytest.raises(KfdistError, match="'right' was due.*once for each head"):
        capture.drain()


@EXACT_AND_MC
def test_a_step_without_observe_is_an_error_and_leaves_nothing_behind(fisher: str):
    model = small_cnn()
    capture = armed_capture(model, fisher=fisher)
    x, y = images(8)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(KfdistError, match=r"preconditioner\.observe\(output, loss\)"):
        capture.drain()
    train(model, capture)
    assert_factors_equal(factors_of(capture.drain()), alone(fisher=fisher), 0.0)


def test_observe_after_backward_is_an_error():
    model = small_cnn()
    capture = armed_capture(model, fisher="mc")
    x, y = images(8)
    output = model(x)
    F.cross_entropy(output, y).backward()
    with pytest.raises(KfdistError, match="after backward"):
        capture.observe(output, "cross_entropy")


def test_a_backward_that_keeps_its_graph_may_come_before_observe():
    model, (x, y) = small_cnn(), images(8)
    capture = armed_capture(model, fisher="exact")
    output = model(x)
    F.cross_entropy(output, y).backward(retain_graph=True)
    capture.observe(output, "cross_entropy")
    assert_factors_equal(factors_of(capture.drain()), alone(fisher="exact"), 0.0)


def test_steps_on_which_nothing_is_due_cost_nothing(monkeypatch: pytest.MonkeyPatch):
    model = small_cnn()
    capture = armed_capture(model, fisher="mc")
    capture.arm({})
    output = model(images(4)[0])
    monkeypatch.setattr(torch.autograd, "grad", None)
    capture.observe(output, "cross_entropy")
    assert not output._backward_hooks
    assert capture.drain() == {}


def test_the_empirical_fisher_ignores_it():
    model, (x, y) = small_cnn(), images(8)
    capture = armed_capture(model)
    output = model(x)
    capture.observe(output, "cross_entropy")
    F.cross_entropy(output, y).backward()
    twin = small_cnn()
    plain = armed_capture(twin)
    F.cross_entropy(twin(x), y).backward()
    assert_factors_equal(factors_of(capture.drain()), factors_of(plain.drain()), 0.0)


def unmeasured_in_eval(model: nn.Module, capture: Capture) -> None:
    model.eval()
    train(model, capture, 5, 3)
    model.train()


def unmeasured_when_paused(model: nn.Module, capture: Capture) -> None:
    with capture.paused():
        output = model(images(5, seed=3)[0])
    capture.observe(output, "cross_entropy")
    output.sum().backward()


def unmeasured_without_gradients(model: nn.Module, capture: Capture) -> None:
    with torch.no_grad():
        capture.observe(model(images(5, seed=3)[0]), "cross_entropy")


def unmeasured_without_observe(model: nn.Module, capture: Capture) -> None:
    model(images(5, seed=3)[0]).sum().backward()


def unmeasured_before_the_step(model: nn.Module, capture: Capture) -> None:
    output = model(images(5, seed=3)[0])
    capture.drain()
    capture.observe(output, "cross_entropy")
    output.sum().backward()


@pytest.mark.parametrize(
    "other",
    [
        unmeasured_in_eval,
        unmeasured_when_paused,
        unmeasured_without_gradients,
        unmeasured_without_observe,
        unmeasured_before_the_step,
    ],
)
def test_what_is_not_measured(other: Callable[[nn.Module, Capture], None]):
    model = small_cnn()
    capture = armed_capture(model, fisher="exact")
    other(model, capture)
    train(model, capture)
    assert_factors_equal(factors_of(capture.drain()), alone(), 0.0)


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_the_scaler_s_scale_plays_no_part(scale: float):
    model, (x, y) = small_cnn(), images(8)
    amp = torch.amp.GradScaler("cpu", init_scale=scale)
    capture = armed_capture(model, fisher="exact", grad_scaler=amp)
    output = model(x)
    capture.observe(output, "cross_entropy")
    amp.scale(F.cross_entropy(output, y)).backward()
    assert_factors_equal(factors_of(capture.drain()), alone(), 0.0)


def test_an_iteration_that_the_scaler_skipped_is_forgotten():
    model = small_cnn()
    amp = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    capture = armed_capture(model, fisher="exact", grad_scaler=amp)
    for poison in (torch.inf, 0.0):
        x, y = images(8)
        x[0, 0, 0, 0] += poison
        output = model(x)
        capture.observe(output, "cross_entropy")
        amp.scale(F.cross_entropy(output, y)).backward()
        amp.step(optimizer)
        if poison:
            amp.update()
            optimizer.zero_grad()
    assert_factors_equal(factors_of(capture.drain()), alone(), 0.0)


def test_autocast():
    model, x = small_cnn().float(), images(8)[0].float()
    capture = armed_capture(model, fisher="exact")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
    capture.observe(output, "cross_entropy")
    drained = capture.drain()
    assert all(total.dtype == torch.float32 for each in drained.values() for total in each.sums.values())
    expected = {name: (A.float(), G.float()) for name, (A, G) in alone().items()}
    assert_factors_equal(factors_of(drained), expected, 0.05)  # bfloat16 keeps 8 bits


def segmented(reentrant: bool) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model: Any = small_cnn()

    def run(x: Tensor) -> Tensor:
        return model[5:](checkpoint(model[1:5], model[0](x), use_reentrant=reentrant))

    return model, run


@EXACT_AND_MC
def test_non_reentrant_checkpoints(fisher: str):
    model, run = segmented(False)
    capture = armed_capture(model, fisher=fisher)
    x, y = images(8)
    output = run(x)
    capture.observe(output, "cross_entropy")
    F.cross_entropy(output, y).backward()
    assert_factors_equal(factors_of(capture.drain()), alone(fisher=fisher), SAME)
    whole = armed_capture(twin := small_cnn(), fisher=fisher)
    output = checkpoint(twin, x, use_reentrant=False)
    assert isinstance(output, Tensor)
    whole.observe(output, "cross_entropy")
    F.cross_entropy(output, y).backward()
    assert_factors_equal(factors_of(whole.drain()), alone(fisher=fisher), SAME)


@pytest.mark.parametrize("observing", [True, False])
def test_reentrant_checkpoints_are_refused(observing: bool):
    model, run = segmented(True)
    capture = armed_capture(model, fisher="mc")
    x, y = images(8)
    output = run(x)
    with pytest.raises(KfdistError, match="use_reentrant=False"):
        if observing:
            capture.observe(output, "cross_entropy")
        F.cross_entropy(output, y).backward()


def test_a_compiled_backward_that_runs_only_once_is_told(monkeypatch: pytest.MonkeyPatch):
    """Torch's own words; whether a compiled graph has such buffers depends on its operators."""

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("This backward function was compiled with non-empty donated buffers which requires ...")

    model = small_cnn()
    capture = armed_capture(model, fisher="mc")
    output = model(images(2)[0])
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    with pytest.raises(KfdistError, match="donated_buffer = False"):
        capture.observe(output, "cross_entropy")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model(backend: str):
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    measured = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        capture = armed_capture(model, fisher="exact")
        output = (torch.compile(model, backend=backend) if compiled else model)(x.double())
        capture.observe(output, "cross_entropy")
        output.square().sum().backward()
        measured.append(factors_of(capture.drain()))
    assert_factors_equal(measured[1], measured[0], SAME)
    torch.compiler.reset()


def test_inputs_are_laid_out_once_for_all_classes(monkeypatch: pytest.MonkeyPatch):
    wanted: list[tuple[str, frozenset[str]]] = []
    real = LayerBlock.factor_sums

    def watch(block: LayerBlock, *args: Any, **kwargs: Any):
        wanted.append((block.name, kwargs["wanted"]))
        return real(block, *args, **kwargs)

    monkeypatch.setattr(LayerBlock, "factor_sums", watch)
    model = small_cnn()
    capture = armed_capture(model, fisher="exact")
    capture.observe(model(images(4)[0]), "cross_entropy")
    for name in blocks_of(model):
        both, once = frozenset({"A", "G"}), frozenset({"G"})
        assert [what for block, what in wanted if block == name] == [both, once, once]


def test_sampling_is_the_same_for_input_and_all_classes():
    """Omega and Gamma of a share of the examples stay unbiased, each from one draw."""
    model = small_cnn()
    capture = armed_capture(model, fisher="exact", sampling=Sampling(examples_fraction=0.5, positions_fraction=0.5))
    output = model(images(8)[0])
    capture.observe(output, "cross_entropy")
    drained = capture.drain()
    assert all(each.examples == 8 for each in drained.values())
    assert drained["7"].sums["A"][0, -1, -1] == 8


class Token:
    """A hook that lives as long as the graph it is on."""

    def __call__(self, *_: Any) -> None:
        pass


def test_a_forward_that_is_dropped_frees_its_graph():
    model = small_cnn()
    capture = armed_capture(model, fisher="mc")
    output, token = model(images(4)[0]), Token()
    output.grad_fn.register_hook(token)
    alive = weakref.ref(token)
    capture.observe(output, "cross_entropy")
    del token, output
    gc.disable()
    try:
        capture.drain()
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("asked", [{"rows": frozenset({"A"})}, {"samples": 4}])
def test_exact_has_no_rows(asked: dict[str, Any]):
    capture = armed_capture(small_cnn(), fisher="exact")
    with pytest.raises(ConfigError, match="fisher='mc'"):
        capture.arm({"2": Request(**asked)})


def test_other_values_are_refused():
    model = small_cnn()
    capture = armed_capture(model, fisher="mc")
    output: Any = model(images(2)[0])
    with pytest.raises(ConfigError, match="choose one of 'cross_entropy'"):
        capture.observe(output, "nll")
    with pytest.raises(ConfigError, match="output is a tuple"):
        capture.observe((output,), "mse")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="not measured here"):
        capture.arm({"9": Request()})
