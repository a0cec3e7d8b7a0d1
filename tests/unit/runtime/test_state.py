"""A preconditioner's state outside of kfdist's own checkpoints."""

import contextlib
import io
from typing import Any

import pytest
import torch
from torch import nn

from kfdist.errors import CheckpointError, KfdistWarning
from kfdist.wire.tree import pack, unpack
from tests.support.faulty.link import FaultyLink
from tests.support.preconditioning import backward, preconditioner, two_layers


@pytest.mark.parametrize("by_torch", [True, False], ids=["torch.save", "safetensors"])
def test_a_state_goes_on_from_a_file_without_pickled_code(by_torch: bool):
    def trained(steps: range, state: Any = None) -> tuple[dict[str, object], list[torch.Tensor]]:
        model = two_layers()
        with preconditioner(model, "kfac-eigen") as pre:
            if state is not None:
                pre.load_state_dict(state)
            for step in steps:
                model.zero_grad()
                backward(model, seed=step)
                pre.step()
            return pre.state_dict(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    state, _ = trained(range(3))
    if by_torch:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        again = torch.load(file, weights_only=True)
    else:
        again = unpack(pack(state))
    _, resumed = trained(range(3, 5), again)
    _, whole = trained(range(5))
    assert all(torch.equal(one, other) for one, other in zip(resumed, whole, strict=True))


def test_the_controller_hears_where_a_loaded_state_goes_on():
    def trained(link: FaultyLink, steps: int, state: Any = None) -> dict[str, Any]:
        model = two_layers()
        with preconditioner(model, "kfac-eigen", link=link) as pre:
            if state is not None:
                pre.load_state_dict(state)
            for step in range(steps):
                model.zero_grad()
                backward(model, seed=step)
                pre.step()
            return pre.state_dict()

    resumed = FaultyLink()
    trained(resumed, 0, trained(FaultyLink(), 3))
    assert resumed.told == [(3, "running"), (3, "finished")]


def test_a_state_of_an_older_format_is_refused_with_what_to_do():
    with preconditioner(two_layers()) as pre:
        state = {**pre.state_dict(), "format": 4}
        with pytest.raises(
            CheckpointError, match="has format 4 and .* reads 5 and 6 alone; resume it with the version"
        ):
            pre.load_state_dict(state)


@pytest.mark.parametrize(("damping", "changes"), [(0.0, {}), (0.25, {"damping": 0.25})])
def test_a_state_of_format_5_goes_on_with_the_damping_that_users_had_set(damping: float, changes: Any):
    with preconditioner(two_layers()) as pre:
        state = {**pre.state_dict(), "format": 5, "damping": damping}
    del state["changes"], state["stages"]
    with preconditioner(two_layers()) as pre:
        pre.load_state_dict(state)
        again = pre.state_dict()
    assert (again["format"], again["changes"]) == (6, changes)


def test_a_bias_that_no_product_adds_keeps_its_gradient_also_right_after_a_resumption():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.tanh(nn.functional.linear(x, self.first.weight) * 2 + self.first.bias))

    def trained(steps: range, state: Any = None) -> object:
        model = Model().double()
        with preconditioner(model, "kfac", factor_period=4, inverse_period=4) as pre:
            if state is not None:
                pre.load_state_dict(state)
            for step in steps:
                model.zero_grad()
                backward(model, seed=step)
                bias, weight = model.first.bias.grad, model.first.weight.grad
                assert bias is not None and weight is not None
                before = bias.clone(), weight.clone()
                with pytest.warns(KfdistWarning, match="its bias") if step == steps[0] else contextlib.nullcontext():
                    pre.step()
                assert torch.equal(bias, before[0]) and not torch.equal(weight, before[1])
            reasons = {row.parameter: row.reason for row in pre.coverage().rows if row.block is None}
            assert list(reasons) == ["first.bias"] and "used by add" in reasons["first.bias"]
            return pre.state_dict()

    trained(range(2, 4), trained(range(2)))
