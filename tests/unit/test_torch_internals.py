"""Every private name of torch that the package uses still exists and does what is assumed of it."""

import gc
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfdist.comm.rendezvous import host_rendezvous
from kfdist.torch_internals import (
    NO_BACKWARD,
    Convolution,
    TorchDispatchMode,
    accumulates,
    accumulates_below,
    changes_in_place,
    children_by_name,
    device_scale,
    keeps_graph,
    never_compiled,
    next_node,
    running_backward,
    running_node,
    scaler_cycle,
    storage_id,
    top_saved_tensors_hooks,
    tree_leaves,
    was_unscaled,
    when_backward_ends,
    with_tensors_for_parameters,
    without_slow_loops,
)

PACKAGE = Path(__file__).parents[2] / "kfdist"


def test_private_modules_of_torch_are_imported_in_one_file_only():
    """What is private by attribute, ruff's SLF001 finds."""
    private = re.compile(r"^\s*(from torch[\w.]*\._|from torch[\w.]* import .*\b_|import torch[\w.]*\._)", re.MULTILINE)
    found = {file.name for file in PACKAGE.rglob("*.py") if private.search(file.read_text(encoding="utf-8"))}
    assert found == {"torch_internals.py"}


def test_backwards_have_numbers_and_nested_ones_their_own():
    seen: list[int] = []
    inner = torch.ones((), requires_grad=True)

    def nested(gradient: Tensor) -> None:
        del gradient
        seen.append(running_backward())
        with torch.enable_grad():
            twice = inner * 2
        twice.register_hook(lambda _: seen.append(running_backward()))
        twice.backward()
        seen.append(running_backward())

    assert running_backward() == NO_BACKWARD
    for _ in range(2):
        outer = torch.ones((), requires_grad=True) * 3
        outer.register_hook(nested)
        outer.backward()
    assert running_backward() == NO_BACKWARD
    first, inside, after, second, *_ = seen
    assert first == after and len({first, inside, second, NO_BACKWARD}) == 4


def test_a_backward_tells_which_gradients_it_adds_to():
    x, w, other = (torch.ones(2, requires_grad=True) for _ in range(3))
    said: list[tuple[bool, ...]] = []

    def ask(_gradient: Tensor) -> None:
        said.append((accumulates(w), accumulates(other), accumulates_below()))

    y = x * w
    y.register_hook(ask)
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    torch.autograd.grad(y.sum(), w, retain_graph=True)
    y.sum().backward(inputs=[w], retain_graph=True)
    y.sum().backward()
    assert [each[:2] for each in said] == [(False, False), (False, False), (True, False), (True, False)]
    assert [each[2] for each in said] == [False, False, False, True]  # x is the nearest leaf


def test_nodes_are_numbered_in_the_order_in_which_they_are_made():
    weight = torch.ones((), requires_grad=True)
    before = next_node()
    products = [weight * 2, weight * 3]
    assert next_node() == before + 2
    ran: list[int | None] = []
    for product in products:
        product.grad_fn.register_prehook(lambda _: ran.append(running_node()))  # type: ignore[union-attr]
    sum(products, torch.zeros(())).backward()
    assert running_node() is None
    assert sorted(number for number in ran if number is not None) == [before, before + 1]


def test_changes_in_place_are_counted_also_through_views():
    tensor = torch.ones(3)
    view, start = tensor.detach(), changes_in_place(tensor)
    assert start is not None
    tensor.add_(1)
    assert changes_in_place(tensor) == changes_in_place(view) == start + 1
    with torch.inference_mode():
        assert changes_in_place(torch.ones(3)) is None


def test_children_that_are_there_twice_are_found():
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert list(children_by_name(model)) == ["0", "1", "2"] and children_by_name(model)["2"] is layer
    model.register_module("nothing", None)
    assert children_by_name(model)["nothing"] is None


def test_all_convolutions_have_one_base():
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    assert all(issubclass(kind, Convolution) for kind in kinds) and not issubclass(nn.Linear, Convolution)


def test_parameters_are_replaced_for_a_while():
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    weight = model[0].weight
    with with_tensors_for_parameters(model, {"0.weight": torch.full((1, 2), 5.0)}):
        assert float(model(torch.ones(1, 2))) == 10.0
    assert model[0].weight is weight


def test_an_operator_that_cannot_be_batched_fails_instead_of_running_slice_by_slice():
    def unknown(x: Tensor) -> Tensor:
        return torch.histc(x, bins=2)

    x = torch.rand(3, 4)
    with without_slow_loops(), pytest.raises(RuntimeError, match="fallback"):
        torch.func.vmap(unknown)(x)
    with pytest.warns(UserWarning, match="performance drop"):
        assert torch.func.vmap(unknown)(x).shape == (3, 2)


def test_a_living_storage_has_an_id_of_its_own():
    empty = [torch.empty(0) for _ in range(2)]
    assert empty[0].data_ptr() == empty[1].data_ptr()
    assert len({storage_id(each.untyped_storage()) for each in empty}) == 2
    view = (many := torch.ones(4))[1:]
    assert storage_id(view.untyped_storage()) == storage_id(many.untyped_storage())


def test_dispatch_modes_see_every_operation():
    class Recorder(TorchDispatchMode):
        names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            del types
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    with Recorder():
        torch.ones(2) @ torch.ones(2)
    assert "aten::dot" in Recorder.names
    assert tree_leaves(({"a": [1, 2]}, 3)) == [1, 2, 3]


def test_the_scaler_tells_what_was_unscaled_and_when_a_cycle_ends():
    weight = nn.Parameter(torch.ones(2))
    used, other = torch.optim.SGD([weight], lr=0.1), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert device_scale(scaler) is None
    for _ in range(2):
        cycle = scaler_cycle(scaler)
        scaler.scale(weight.sum()).backward()
        assert not was_unscaled(scaler, used) and not was_unscaled(scaler, None)
        scaler.unscale_(used)
        assert was_unscaled(scaler, used) and was_unscaled(scaler, None) and not was_unscaled(scaler, other)
        scale = device_scale(scaler)
        assert isinstance(scale, Tensor) and float(scale) == 8.0
        assert scaler_cycle(scaler) is cycle
        scaler.step(used)
        scaler.update()
        assert scaler_cycle(scaler) is not cycle and not was_unscaled(scaler, None)
        used.zero_grad()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.Adafactor])
def test_an_optimizer_that_is_never_compiled_steps_saves_and_restores_as_torchs_does(kind: type[torch.optim.Optimizer]):
    weight, plain_weight = (nn.Parameter(torch.arange(6.0).view(2, 3)) for _ in range(2))
    settings: Any = {"lr": 0.1, "weight_decay": 0.01}
    optimizer, plain = kind([weight], **settings), never_compiled(kind)([plain_weight], **settings)
    assert type(plain).__name__ == kind.__name__ and isinstance(plain, kind)
    before: list[bool] = []
    plain.register_step_pre_hook(lambda *_: before.append(torch.is_grad_enabled()))
    for step in range(3):
        if step == 2:
            restored = never_compiled(kind)([plain_weight], **settings)
            restored.load_state_dict(plain.state_dict())
            plain = restored
        for each, its in ((weight, optimizer), (plain_weight, plain)):
            its.zero_grad()
            assert each.grad is None
            (each.sin().sum() ** 2).backward()
            assert its.step() is None
        assert torch.equal(weight, plain_weight)
    assert before == [True, True]
    assert plain.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_an_optimizer_that_is_never_compiled_evaluates_its_closure_with_gradients():
    weight = nn.Parameter(torch.ones(2))
    optimizer = never_compiled(torch.optim.SGD)([weight], **{"lr": 0.5})

    def closure() -> float:
        optimizer.zero_grad()
        loss = weight.sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == 2.0
    assert torch.equal(weight.detach(), torch.full((2,), 0.5))


def test_a_store_serves_on_the_socket_it_was_given():
    rendezvous = host_rendezvous(1)
    assert int(rendezvous.variables(0)["MASTER_PORT"]) == rendezvous.store.port > 0
    rendezvous.store.set("key", "value")
    assert rendezvous.store.get("key") == b"value"
    del rendezvous
    gc.collect()


def test_the_end_of_a_backward_is_told_and_one_that_fails_forgets_whom_to_tell():
    ends: list[str] = []

    class Told:
        def __call__(self) -> None:
            ends.append("end")

    def run(fails: bool, **how: Any) -> Any:
        told = Told()
        kept: list[bool] = []

        def hook(_: Tensor) -> None:
            when_backward_ends(told)
            kept.append(keeps_graph())
            if fails:
                raise RuntimeError

        product = torch.ones(2, requires_grad=True) * 3
        product.register_hook(hook)
        try:
            product.sum().backward(**how)
        except RuntimeError:
            assert fails
        return weakref.ref(told), kept

    assert run(False)[1] == [False] and ends == ["end"]
    assert run(False, retain_graph=True)[1] == [True] and len(ends) == 2
    forgotten, _ = run(True)
    gc.collect()
    assert forgotten() is None and len(ends) == 2


def test_what_saves_tensors_is_known_and_calling_it_keeps_its_count():
    """Non-reentrant checkpointing counts what it saves: what is packed for it by another must be the same."""
    assert top_saved_tensors_hooks() is None
    packed: list[Tensor] = []

    def pack(saved: Tensor) -> int:
        packed.append(saved)
        return len(packed) - 1

    x = torch.randn(3, 2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, packed.__getitem__):
        found = top_saved_tensors_hooks()
        assert found is not None
        with torch.autograd.graph.saved_tensors_hooks(*found):
            y = x.sin()
    y.sum().backward()
    assert len(packed) == 1 and x.grad is not None and torch.equal(x.grad, x.detach().cos())
