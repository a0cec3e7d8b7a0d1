"""`kfdist.Optimizer` with `ekfac-adam`, whose directions have their size and momentum already."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import kfdist
from kfdist.errors import ConfigError
from tests.support.optimizing import BETAS, DECAY, EPS, LR, SYNCHRONOUS, backward, optimizer_of, small_model, train

ADAM: dict[str, Any] = {"method": "ekfac-adam", "inverse_period": 2}


def reference(steps: int = 5) -> list[Tensor]:
    """The linear layers along the directions that `Preconditioner.step` writes; the norm by AdamW."""
    model = small_model()
    linear = [*model[0].parameters(), *model[3].parameters()]
    adamw = torch.optim.AdamW(model[2].parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    with kfdist.Preconditioner(model, **{**SYNCHRONOUS, **ADAM}, kl_clip=1e-9, lr=LR) as preconditioner:
        for seed in range(steps):
            backward(model, seed)
            preconditioner.step()
            adamw.step()
            with torch.no_grad():
                for p in linear:
                    assert p.grad is not None
                    p.mul_(1 - LR * DECAY).sub_(LR * p.grad)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("graft", ["adamw", None])
def test_directions_are_neither_clipped_nor_grafted_nor_averaged_and_norms_are_adamws(graft: Any):
    model = small_model()
    with optimizer_of(model, graft=graft, **ADAM) as optimizer:
        mine = train(model, optimizer, 5)
        reasons = {row.parameter: row.reason for row in optimizer.preconditioner.coverage().rows}
        assert "left to the optimizer" in reasons["2.weight"]
        assert "exp_avg" in optimizer.state[model[2].weight] and not optimizer.state[model[0].weight]
    for a, b in zip(mine, reference(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_a_saved_run_goes_on_bit_for_bit():
    model, other = small_model(), small_model()
    with optimizer_of(model, **ADAM) as optimizer:
        train(model, optimizer, 3)
        weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        expected = train(model, optimizer, 4)
    with optimizer_of(other, **ADAM) as optimizer:
        other.load_state_dict(weights)
        optimizer.load_state_dict(state)
        assert all(map(torch.equal, train(other, optimizer, 4), expected))


@pytest.mark.parametrize("method", ["ekfac-adam", "soap", "kl-shampoo"])
def test_adamws_moments_go_where_blocks_have_their_own(method: str):
    model, other = small_model(), small_model()
    adamw = torch.optim.AdamW(model.parameters(), lr=0.5)
    train(model, adamw, 3)
    with optimizer_of(other, method=method) as optimizer:
        optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
        state = [optimizer.state[parameter] for parameter in other.parameters()]
        assert "exp_avg_sq" in state[0]
        train(other, optimizer, 1)
        first, _, norm, _, last, _ = (optimizer.state[parameter] for parameter in other.parameters())
        assert not first and not last and float(norm["step"]) == 4.0


def test_a_direction_that_is_uphill_stays():
    """Momentum leads on when the gradient turns round."""
    model = small_model()
    weight = next(model.parameters())
    with optimizer_of(model, weight_decay=0.0, **ADAM) as optimizer:
        for step in range(6):
            backward(model, 0)
            assert weight.grad is not None
            if step == 5:
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.grad.neg_()
            before = weight.detach().clone()
            optimizer.step()
        assert float(torch.sum((weight.detach() - before) * weight.grad)) > 0 and optimizer.replaced == 0


def test_the_learning_rate_is_adamws_so_sgds_graft_is_refused():
    with pytest.raises(ConfigError, match="graft.*ekfac-adam goes by AdamW's learning rate"):
        optimizer_of(small_model(), graft="sgd", **ADAM)
