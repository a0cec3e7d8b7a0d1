"""What is measured and what is not, and that what is not measured costs nothing."""

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfdist.capture.requests import Request
from kfdist.curvature.blocks import LayerBlock
from tests.support.factors import Factors, armed_capture, assert_factors_equal, blocks_of, factors_of
from tests.support.preconditioning import rows, two_layers
from tests.support.small_models import images, small_cnn


def backward(model: nn.Module, n: int = 8, seed: int = 0) -> None:
    x, y = images(n, seed=seed)
    nn.functional.cross_entropy(model(x), y).backward()


def alone(n: int = 8, seed: int = 0):
    """The factors of one batch and nothing else."""
    model = small_cnn()
    capture = armed_capture(model)
    backward(model, n, seed)
    return factors_of(capture.drain())


@pytest.fixture
def factor_sums_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    real = LayerBlock.factor_sums

    def counted(block: LayerBlock, *args: Any, **kwargs: Any):
        calls.append(block.name)
        return real(block, *args, **kwargs)

    monkeypatch.setattr(LayerBlock, "factor_sums", counted)
    return calls


def outputs_of_layers(model: nn.Module) -> dict[str, Tensor]:
    """Filled by the next forward."""
    outputs: dict[str, Tensor] = {}

    def remember(name: str, _module: nn.Module, _args: Any, output: Tensor) -> None:
        outputs[name] = output

    for name in blocks_of(model):
        model.get_submodule(name).register_forward_hook(partial(remember, name))
    return outputs


def hooks_on(tensor: Tensor) -> int:
    return len(tensor._backward_hooks or {})


def test_eval_mode_is_not_measured():
    model = small_cnn().eval()
    capture = armed_capture(model)
    backward(model)
    assert capture.drain() == {}


def test_a_layer_in_eval_mode_is_not_measured():
    model: Any = small_cnn()
    model[5].eval()
    capture = armed_capture(model)
    backward(model)
    assert set(capture.drain()) == {"0", "2", "7"}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_forwards_without_gradients_are_not_measured(context: type):
    model = small_cnn()
    capture = armed_capture(model)
    with context():
        model(images(5)[0])
    backward(model)
    assert_factors_equal(factors_of(capture.drain()), alone(), 0.0)


def test_paused_forwards_are_not_measured():
    model = small_cnn()
    capture = armed_capture(model)
    with capture.paused(), capture.paused():
        loss = nn.functional.cross_entropy(model(images(5, seed=3)[0]), images(5, seed=3)[1])
    loss.backward()  # outside: it is the forward that counts
    backward(model)
    assert_factors_equal(factors_of(capture.drain()), alone(), 0.0)


def test_a_part_of_a_forward_may_be_paused():
    model: Any = small_cnn()
    capture = armed_capture(model)
    x, y = images(8)
    hidden = model[:5](x)
    with capture.paused():
        hidden = model[5](hidden)
    nn.functional.cross_entropy(model[6:](hidden), y).backward()
    assert set(capture.drain()) == {"0", "2", "7"}

    class PausesItself(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            with capture.paused():
                x = self.first(x)
            return self.second(x)

    model = PausesItself()
    capture = armed_capture(model)
    model(torch.randn(2, 3)).sum().backward()
    assert set(capture.drain()) == {"second"}


def test_paused_ends_with_an_exception():
    model = small_cnn()
    capture = armed_capture(model)
    with pytest.raises(RuntimeError), capture.paused():
        raise RuntimeError
    backward(model)
    assert_factors_equal(factors_of(capture.drain()), alone(), 0.0)


def test_evaluation_with_a_backward_in_eval_mode_does_not_count():
    """An adversarial example is made in eval mode; it must not look like a micro-batch."""
    model = small_cnn()
    capture = armed_capture(model)
    model.eval()
    x = images(8)[0].requires_grad_()
    torch.autograd.grad(model(x).sum(), x)
    model.train()
    backward(model)
    assert_factors_equal(factors_of(capture.drain()), alone(), 0.0)


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("when", ["before", "between", "same graph"])
def test_what_makes_no_gradients_is_no_backward(when: str, fisher: str):
    """Adversarial examples and saliencies by `torch.autograd.grad`, in training mode."""

    def losses(*, with_grad: bool) -> Factors:
        model = two_layers()
        capture = armed_capture(model, fisher=fisher)
        for start in (0, 4):
            x, y = (each[start : start + 4] for each in rows(8))
            x = x.requires_grad_()
            if with_grad and (when == "before" or (when == "between" and start)):
                torch.autograd.grad(model(x).square().sum(), x)
            z = model(x)
            if with_grad and when == "same graph":
                torch.autograd.grad(z.square().sum(), x, retain_graph=True)
            capture.observe(z, "cross_entropy")
            (nn.functional.cross_entropy(z, y) / 2).backward()
        found = factors_of(capture.drain())
        assert not capture.unmeasured
        return found

    assert_factors_equal(losses(with_grad=True), losses(with_grad=False), 0.0)


def test_a_gradient_in_the_loss_is_said_not_to_be_measured():
    model = two_layers()
    capture = armed_capture(model)
    x = rows(8)[0].requires_grad_()
    z = model(x)
    (gradient,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    (z.square().sum() + gradient.square().sum()).backward()
    assert capture.drain().keys() == capture.unmeasured.keys() == {"0", "2"}
    assert all("also used by torch.autograd.grad with create_graph" in why for why in capture.unmeasured.values())


def test_a_forward_without_backward_is_dropped_at_the_step():
    model = small_cnn()
    capture = armed_capture(model)
    x, y = images(5, seed=3)
    late = nn.functional.cross_entropy(model(x), y)
    assert capture.drain() == {}
    late.backward()
    backward(model)
    assert_factors_equal(factors_of(capture.drain()), alone(), 0.0)


def test_a_forward_whose_output_is_not_used_adds_nothing():
    model = small_cnn()
    capture = armed_capture(model)
    model(images(5, seed=3)[0])
    backward(model)
    assert_factors_equal(factors_of(capture.drain()), alone(), 0.0)


def test_each_step_starts_afresh():
    model = small_cnn()
    capture = armed_capture(model)
    for seed in range(3):
        backward(model, 4 + seed, seed)
        assert_factors_equal(factors_of(capture.drain()), alone(4 + seed, seed), 0.0)


def test_a_failed_forward_leaves_nothing_behind():
    model = small_cnn()
    capture = armed_capture(model)
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 2, 9, 9).double())
    backward(model)
    assert_factors_equal(factors_of(capture.drain()), alone(), 0.0)


def test_copies_of_the_model_are_not_measured():
    model = small_cnn()
    capture = armed_capture(model)
    twin = copy.deepcopy(model)
    backward(twin, 5, 3)
    backward(model)
    assert_factors_equal(factors_of(capture.drain()), alone(), 0.0)


def test_blocks_that_are_not_due_cost_nothing(factor_sums_calls: list[str]):
    model = small_cnn()
    capture = armed_capture(model)
    capture.arm({"2": Request()})
    backward(model)
    assert factor_sums_calls == ["2"]
    assert set(capture.drain()) == {"2"}


def test_a_step_without_due_blocks_registers_no_hook(factor_sums_calls: list[str]):
    model = small_cnn()
    capture = armed_capture(model)
    capture.arm({})
    outputs = outputs_of_layers(model)
    x, y = images(8)
    nn.functional.cross_entropy(model(x), y).backward()
    assert len(outputs) == 4
    assert [hooks_on(each) for each in outputs.values()] == [0] * 4
    assert factor_sums_calls == []
    assert capture.drain() == {}


def test_a_due_layer_copies_nothing_in_its_forward(monkeypatch: pytest.MonkeyPatch):
    """Between forward and backward only a reference to the input is kept."""
    model = nn.Linear(4, 2)
    capture = armed_capture(model)
    x = torch.randn(3, 4)
    seen: list[int] = []
    real = LayerBlock.factor_sums

    def look(block: LayerBlock, activation: Tensor, *args: Any, **kwargs: Any):
        seen.append(activation.untyped_storage().data_ptr())
        return real(block, activation, *args, **kwargs)

    monkeypatch.setattr(LayerBlock, "factor_sums", look)
    model(x).sum().backward()
    assert seen == [x.untyped_storage().data_ptr()]
    assert set(capture.drain()) == {""}


def test_close_removes_every_hook(factor_sums_calls: list[str]):
    model = small_cnn()
    capture = armed_capture(model)
    loss = nn.functional.cross_entropy(model(images(4)[0]), images(4)[1])
    capture.close()
    loss.backward()
    backward(model)
    assert factor_sums_calls == []
    assert capture.drain() == {}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_two_captures_on_one_model_do_not_mix():
    model = small_cnn()
    first = armed_capture(model, names=["0"])
    second = armed_capture(model, names=["2", "7"])
    backward(model)
    assert set(first.drain()) == {"0"}
    assert set(second.drain()) == {"2", "7"}


def test_nothing_is_left_on_the_model_on_a_due_step_either():
    """So that it can be copied, pickled and compiled as if nobody watched it."""
    model = small_cnn()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    capture = armed_capture(model)
    loss = nn.functional.cross_entropy(model(images(4)[0]), images(4)[1])
    for name, module in model.named_modules():
        assert vars(module) == before[name]
    pickle.loads(pickle.dumps(model))
    loss.backward()
    assert set(capture.drain()) == {"0", "2", "5", "7"}


def test_the_hooks_on_all_modules_are_there_only_while_something_is_due_and_the_capture_lives():
    def counted() -> tuple[int, int]:
        gc.collect()
        hooks = torch.nn.modules.module
        return len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)

    before = counted()
    model = small_cnn()
    capture = armed_capture(model)
    armed = tuple(number + 1 for number in before)
    assert counted() == armed
    capture.arm({})
    assert counted() == before
    capture.arm({"0": Request()})
    assert counted() == armed
    del capture
    assert counted() == before


def test_rollouts_in_another_thread_do_not_mix_with_training():
    model = small_cnn()
    capture = armed_capture(model)
    started, finish = threading.Event(), threading.Event()

    def roll_out() -> None:
        with torch.no_grad(), capture.paused():
            while not finish.is_set():
                model(images(3, seed=7)[0])
                started.set()

    thread = threading.Thread(target=roll_out)
    thread.start()
    try:
        assert started.wait(10)
        for seed in range(5):
            backward(model, seed=seed)
            assert_factors_equal(factors_of(capture.drain()), alone(seed=seed), 0.0)
    finally:
        finish.set()
        thread.join()


@pytest.mark.parametrize("end", ["drain", "close", "forgotten"])
def test_a_forward_that_was_interrupted_leaves_nothing_on_the_stack(end: str):
    def modes() -> int:
        gc.collect()
        return torch._C._len_torch_function_stack()

    before = modes()
    model = nn.Sequential(nn.Linear(3, 3), nn.Identity())
    capture = armed_capture(model)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(2, 3))
    assert modes() == before + 1
    if end == "forgotten":
        del capture
        assert modes() == before
        return
    capture.drain() if end == "drain" else capture.close()
    assert modes() == before
    if end == "drain":
        handle.remove()
        model(torch.ones(2, 3)).sum().backward()
        assert set(capture.drain()) == {"0"}


def test_a_layer_that_is_frozen_for_now_is_not_measured():
    """A discriminator in the generator's turn: the loss goes through it, and it has no gradient."""
    model = small_cnn()
    capture = armed_capture(model)
    model.requires_grad_(False)
    x, y = images(5, seed=3)
    nn.functional.cross_entropy(model(x.requires_grad_()), y).backward()
    model.requires_grad_(True)
    backward(model)
    assert_factors_equal(factors_of(capture.drain()), alone(), 0.0)


def test_in_a_model_that_is_frozen_in_part_the_rest_is_measured():
    model: Any = small_cnn()
    expected = alone()
    capture = armed_capture(model)
    model[2].requires_grad_(False)
    backward(model)
    del expected["2"]
    assert_factors_equal(factors_of(capture.drain()), expected, 0.0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_forward_in_another_thread_outlives_a_step_and_leaves_nothing_behind(mode: type):
    """An actor's rollout, or a validation, is in the midst of a forward when the training thread steps."""
    inside, go_on = threading.Event(), threading.Event()

    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread() is not threading.main_thread():
                inside.set()
                assert go_on.wait(10)
            return x

    model = nn.Sequential(nn.Linear(3, 3), Waits(), nn.Linear(3, 2)).double()
    capture = armed_capture(model)
    modes: list[int] = []

    def roll_out() -> None:
        with mode():
            model(torch.ones(7, 3).double())
        modes.append(torch._C._len_torch_function_stack())

    def step(n: int) -> dict[str, Any]:
        model(torch.ones(n, 3).double()).sum().backward()
        return capture.drain()

    def with_other_thread(end: Callable[[], Any]) -> None:
        inside.clear()
        go_on.clear()
        thread = threading.Thread(target=roll_out)
        thread.start()
        assert inside.wait(10)
        end()
        go_on.set()
        thread.join()

    drained: list[dict[str, Any]] = []
    with_other_thread(lambda: drained.append(step(4)))
    assert {name: each.examples for name, each in drained[0].items()} == {"0": 4, "2": 4}
    assert modes == [0]
    assert {each.examples for each in step(5).values()} == {5}


def test_a_thread_whose_forward_the_end_of_watching_overtook_starts_afresh():
    model = nn.Sequential(nn.Linear(3, 3), nn.Identity(), nn.Linear(3, 2)).double()
    capture = armed_capture(model)
    inside, go_on = threading.Event(), threading.Event()
    found: list[Any] = []

    def wait(*_: Any) -> None:
        inside.set()
        assert go_on.wait(10)

    def train() -> None:
        handle = model[1].register_forward_pre_hook(wait)
        model(torch.ones(7, 3).double())
        handle.remove()
        capture.arm(dict.fromkeys(["0", "2"], Request()))
        model(torch.ones(4, 3).double()).sum().backward()
        found.append(capture.drain())
        found.append(torch._C._len_torch_function_stack())

    thread = threading.Thread(target=train)
    thread.start()
    assert inside.wait(10)
    capture.arm({})
    go_on.set()
    thread.join()
    assert {name: each.examples for name, each in found[0].items()} == {"0": 4, "2": 4}
    assert found[1] == 0


def test_a_forward_of_another_thread_is_not_taken_for_one_that_checkpointing_repeats():
    """Each thread numbers its nodes by itself; a whole forward that is repeated is found by number."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=True)

    model = Checkpointed()
    capture = armed_capture(model)
    x = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)

    def validate() -> None:
        for _ in range(40):
            torch.ones((), requires_grad=True) * 2
            with torch.no_grad():
                model(torch.ones(7, 3).double())

    for work in (validate, lambda: model(x).sum().backward()):  # each from number 0 on
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert {each.examples for each in capture.drain().values()} == {4}
