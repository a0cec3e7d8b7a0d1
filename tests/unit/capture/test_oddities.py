"""Tensors that can't be measured are named, and never raise inside somebody's forward or backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfdist.errors import KfdistWarning
from tests.support.factors import Factors, armed_capture, assert_factors_equal, factors_of
from tests.support.preconditioning import preconditioner

INSIDE = "linear inside torch.func, which can't be measured"
NESTED = "linear of a nested tensor, which can't be measured"


def nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=layout)


CALLS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "vmap": (lambda model, x: torch.func.vmap(model)(x).sum(), INSIDE),
    "jvp": (lambda model, x: torch.func.jvp(model, (x,), (x,))[1].sum(), INSIDE),
    "jagged": (lambda model, _: model(nested(torch.jagged)).values().sum(), NESTED),
    "nested": (lambda model, _: torch.nested.to_padded_tensor(model(nested(torch.strided)), 0.0).sum(), NESTED),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("call", "why"), CALLS.values(), ids=CALLS.keys())
def test_what_has_no_values_of_its_own_is_not_measured_and_that_is_said(
    call: Callable[[nn.Module, Tensor], Tensor], why: str
):
    whole = nn.Sequential(nn.Linear(4, 4))
    capture = armed_capture(whole)
    call(whole, torch.randn(3, 4)).backward()
    assert not capture.drain()
    assert capture.unmeasured == {"0": f"it is used by {why}"}
    capture.close()


def test_a_gradient_that_torch_func_takes_on_the_way_is_no_backward_of_the_loss():
    def measured(*, twice: bool) -> tuple[Factors, Any]:
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double(), torch.randn(5, 4).double()
        capture = armed_capture(model)
        loss = model(x).square().mean()
        if twice:
            torch.func.grad(lambda z: model(z).sum())(x)
        loss.backward()
        found = factors_of(capture.drain())
        capture.close()
        return found, capture.unmeasured

    plain, nothing = measured(twice=False)
    found, unmeasured = measured(twice=True)
    assert_factors_equal(found, plain, 1e-12)
    assert not nothing and set(unmeasured) == {"0", "2"} and INSIDE in unmeasured["0"]


class Attends(nn.Module):
    """Attention, plain or inside a reentrant checkpoint."""

    def __init__(self, *, checkpointed: bool) -> None:
        super().__init__()
        self.attention, self.checkpointed = nn.MultiheadAttention(4, 2, batch_first=True), checkpointed

    def forward(self, x: Tensor) -> Tensor:
        def attend(z: Tensor) -> Tensor:
            return self.attention(z, z, z, need_weights=False)[0]

        found = checkpoint(attend, x, use_reentrant=True) if self.checkpointed else attend(x)
        assert isinstance(found, Tensor)
        return found


def test_attention_inside_a_reentrant_checkpoint_and_under_autocast():
    def measured(*, checkpointed: bool, half: bool) -> Factors:
        torch.manual_seed(0)
        model = Attends(checkpointed=checkpointed)
        capture = armed_capture(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            y = model(torch.randn(6, 5, 4, requires_grad=True))
        y.float().square().sum().div(6).backward()
        found = factors_of(capture.drain())
        capture.close()
        return found

    plain = measured(checkpointed=False, half=False)
    assert len(plain) == 4
    assert_factors_equal(measured(checkpointed=True, half=False), plain, 1e-6)
    assert_factors_equal(measured(checkpointed=False, half=True), plain, 6e-2)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_parameters_without_entries_or_values_break_no_step():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.none, self.later = nn.Linear(3, 3), nn.Linear(3, 0), nn.LazyLinear(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.later(torch.cat([self.first(x), self.none(x)], 1))

    model = Model()
    with preconditioner(model, "kfac") as pre:
        for step in range(2):
            model(torch.randn(4, 3)).square().mean().backward()
            if step:
                pre.step()
            else:
                with pytest.warns(KfdistWarning, match="'later.bias', 'later.weight': it was frozen, or had no values"):
                    pre.step()
