"""Directions of small blocks found in one go, against those of the same blocks one by one."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfdist
from kfdist.curvature.adam_moments import FIRST, FIRST_WEIGHT, SECOND
from kfdist.curvature.inverters.ekfac_adam import EkfacAdam
from kfdist.optim.optimizer import Optimizer
from kfdist.runtime.apply import side_by_side as packing
from kfdist.runtime.apply.applications import Applying
from kfdist.runtime.apply.side_by_side import Together
from tests.support.tiers import in_turn

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


class Model(nn.Module):
    """A convolution and layers with and without bias, of which `head` is used on some steps only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3)
        self.body = nn.Linear(20, 7, bias=False)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor, *, whole: bool) -> Tensor:
        hidden = self.body(torch.tanh(self.conv(x)).flatten(1))
        return self.head(hidden) if whole else hidden


def make(method: str | EkfacAdam, dtype: torch.dtype) -> tuple[Model, Optimizer]:
    torch.manual_seed(0)
    model = Model().to(dtype)
    return model, Optimizer(
        model, lr=0.01, method=method, factor_period=1, inverse_period=3, adoption=kfdist.FixedLag(1), sampling=ALL
    )


ALL = kfdist.Sampling()


def train(model: Model, optimizer: Optimizer, steps: Sequence[int], partly: Sequence[int] = ()) -> list[Tensor]:
    for step in steps:
        inputs = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs.to(model.body.weight.dtype), whole=step not in partly).square().mean().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Together, "apply", lambda _self, applications, _into: applications)


def applying(optimizer: Optimizer) -> Applying:
    return optimizer.preconditioner.pipeline.applying


def memories(optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    return {name: memory.kept for track in applying(optimizer).tracks for name, memory in track.memories.items()}


METHODS = [*(("ekfac-adam", dtype) for dtype in DTYPES), ("soap", DTYPES[0])]


@pytest.mark.parametrize(("kind", "partly"), in_turn(METHODS, [(), (6,), (4, 5, 6), (2, 4, 6, 8)], of=2))
def test_steps_are_those_of_blocks_one_by_one(
    kind: tuple[str, torch.dtype], partly: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    model, optimizer = make(*kind)
    with optimizer:
        together = train(model, optimizer, range(12), partly)
        firsts = {kept[FIRST].untyped_storage().data_ptr() for kept in memories(optimizer).values()}
        assert len(firsts) == 1, "their moments lie in one tensor"
        kept = {name: {key: each.clone() for key, each in of.items()} for name, of in memories(optimizer).items()}
    one_by_one(monkeypatch)
    model, optimizer = make(*kind)
    with optimizer:
        expected = train(model, optimizer, range(12), partly)
        for name, of_block in memories(optimizer).items():
            assert of_block.keys() == kept[name].keys()
            assert all(torch.equal(kept[name][key], each) for key, each in of_block.items())
        assert len({kept[FIRST].untyped_storage().data_ptr() for kept in memories(optimizer).values()}) == 3
    assert all(map(torch.equal, together, expected))


def test_a_state_of_the_middle_of_training_goes_on_bit_for_bit():
    model, optimizer = make("ekfac-adam", torch.float32)
    with optimizer:
        train(model, optimizer, range(6), partly=[3])
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        expected = train(model, optimizer, range(6, 10))
    state = saved[1]["preconditioner"]["memories"]["body"]["kept"]
    assert state.keys() == {"first", "second", "first_weight", "second_weight"}
    assert state["first"].untyped_storage().nbytes() == state["first"].numel() * 4, "no more than its own is saved"
    model, optimizer = make("ekfac-adam", torch.float32)
    with optimizer:
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        assert all(map(torch.equal, train(model, optimizer, range(6, 10)), expected))


def test_other_betas_after_a_resume_are_those_of_new_bases_alone(monkeypatch: pytest.MonkeyPatch):
    model, optimizer = make("ekfac-adam", torch.float32)
    with optimizer:
        train(model, optimizer, range(5))
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def resumed() -> list[Tensor]:
        model, optimizer = make(EkfacAdam(beta1=0.5, beta2=0.6, eps=1e-3), torch.float32)
        with optimizer:
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            return train(model, optimizer, range(5, 14))

    together = resumed()
    one_by_one(monkeypatch)
    assert all(map(torch.equal, together, resumed()))


def test_models_that_alternate_are_packed_once(monkeypatch: pytest.MonkeyPatch):
    packed: list[int] = []
    pack = packing._packed
    monkeypatch.setattr(packing, "_packed", lambda chosen: packed.append(len(chosen)) or pack(chosen))
    model, optimizer = make("ekfac-adam", torch.float32)
    with optimizer:
        train(model, optimizer, range(18), partly=[4, 5, 8, 9, 12, 13, 16, 17])
    assert packed == [3, 2]


def test_skipped_steps_and_directions_outside_of_steps_change_no_moment():
    model, optimizer = make("ekfac-adam", torch.float32)
    with optimizer:
        train(model, optimizer, range(4))
        before = {name: kept[SECOND].clone() for name, kept in memories(optimizer).items()}
        assert optimizer.preconditioner.directions(0.1).keys() == set(model.parameters())
        into: dict[nn.Parameter, Tensor] = {}
        applying(optimizer).apply(4, {}, lambda _: 1.0, torch.tensor(False), into)
        assert into.keys() == set(model.parameters())
        for name, kept in memories(optimizer).items():
            assert torch.equal(kept[SECOND], before[name])


def test_preconditioner_writes_the_same_into_grad(monkeypatch: pytest.MonkeyPatch):
    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        model = Model()
        settings: dict[str, Any] = {"factor_period": 1, "inverse_period": 2, "adoption": kfdist.FixedLag(0)}
        with kfdist.Preconditioner(model, "ekfac-adam", kl_clip=None, **settings) as preconditioner:
            for step in range(4):
                model.zero_grad()
                inputs = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(step))
                model(inputs, whole=True).square().mean().backward()
                preconditioner.step()
            weight = preconditioner.pipeline.tracks[0].memories["conv"].kept[FIRST_WEIGHT]
            assert float(weight) == pytest.approx(1 - 0.9**4)
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    together = gradients()
    one_by_one(monkeypatch)
    assert all(map(torch.equal, together, gradients()))
