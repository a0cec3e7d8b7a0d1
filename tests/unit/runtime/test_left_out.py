"""Trained parameters that no block has are said at the first step, or when they come."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import kfdist
from kfdist.curvature.by_width import BARE
from kfdist.errors import KfdistWarning
from kfdist.runtime.preconditioner import Preconditioner
from tests.support.preconditioning import backward, preconditioner, two_layers

Q = 4


def steps(model: nn.Module, before: Callable[[int], Any] = lambda step: None, **options: Any) -> tuple[list[str], Any]:
    """What is said in four steps, and the coverage after them."""
    x: Tensor = torch.randn(5, Q)
    with preconditioner(model, "kfac", **options) as pre, warnings.catch_warnings(record=True) as caught:
        assert isinstance(pre, Preconditioner)
        warnings.simplefilter("always", KfdistWarning)
        for step in range(4):
            before(step)
            model.zero_grad()
            model(x).square().mean().backward()
            pre.step()
        coverage = pre.coverage()
    return [str(each.message) for each in caught if issubclass(each.category, KfdistWarning)], coverage


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(Q, Q), nn.Tanh(), nn.Linear(Q, Q))


def test_a_layer_without_a_block_is_said_once_and_skip_silences_it() -> None:
    model = layers()
    parametrizations.weight_norm(model[0])
    said, coverage = steps(model)
    assert len(said) == 1 and said[0].startswith("2 parameters have gradients and no block: '0.parametrizations.weight")
    assert f"{coverage.share:.2%} of the trained numbers" in said[0]
    assert not steps(model, skip=["0.parametrizations"])[0]


@pytest.mark.parametrize("period", [1, 2])
def test_what_is_thawed_later_is_said_and_counts(period: int) -> None:
    model = layers()
    model[0].requires_grad_(False)

    def thaw(step: int) -> None:
        if step == 2:
            model[0].requires_grad_(True)

    said, coverage = steps(model, thaw, factor_period=period, inverse_period=period)
    assert len(said) == 1 and "'0.bias', '0.weight': it was frozen" in said[0]
    assert coverage.share == 0.5


def test_a_bias_that_is_thawed_later_keeps_its_plain_gradient_beside_its_weights_block() -> None:
    model = two_layers()
    bias, weight = model.get_parameter("0.bias"), model.get_parameter("0.weight")
    bias.requires_grad_(False)
    with preconditioner(model) as pre:
        backward(model)
        pre.step()
        bias.requires_grad_(True)
        model.zero_grad()
        backward(model, seed=1)
        assert bias.grad is not None and weight.grad is not None
        before = bias.grad.clone(), weight.grad.clone()
        with pytest.warns(KfdistWarning, match=r"'0\.bias': it was frozen.*keep their plain gradients"):
            pre.step()
        assert torch.equal(bias.grad, before[0]) and not torch.equal(weight.grad, before[1])
        assert pre.coverage().share == 1 - 5 / 43


def test_what_is_skipped_is_no_news_when_it_is_thawed() -> None:
    model = layers()
    model[0].requires_grad_(False)
    said, coverage = steps(model, lambda step: model[0].requires_grad_(step > 1), skip=["0"])
    assert not said
    assert coverage.share == 0.5


def test_what_is_added_later_is_said_and_counts() -> None:
    model = layers()
    said, coverage = steps(model, lambda step: model.append(nn.Linear(Q, Q)) if step == 1 else None)
    assert len(said) == 1 and "'3.bias', '3.weight': it was added after the Preconditioner was made" in said[0]
    assert coverage.share == pytest.approx(2 / 3)


def test_what_stays_frozen_or_has_no_gradient_is_no_news() -> None:
    model = layers()
    model[0].requires_grad_(False)
    model.register_module("unused", parametrizations.weight_norm(nn.Linear(Q, Q)))
    model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
    assert not steps(model)[0]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_scripted_model_whose_operations_are_not_seen_is_said() -> None:
    said, coverage = steps(torch.jit.script(layers()))
    assert len(said) == 1 and "were due at step 0 and have gradients" in said[0]
    assert coverage.share == 0


class Holds(nn.Module):
    """Has positions, and a matrix that its code doesn't show as one."""

    def __init__(self, shape: tuple[int, ...], use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.kernel = nn.Linear(Q, Q), nn.Parameter(torch.randn(shape))
        self.positions, self.use = nn.Parameter(torch.randn(3, Q)), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.layer(x) + self.positions, self.kernel)


DISGUISED: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "scaled": ((2, Q), lambda x, w: F.linear(x, 0.5 * w)),
    "tensordot": ((2, Q), lambda x, w: torch.tensordot(x, w, dims=([2], [1]))),
    "convolution": ((2, 3, 2), F.conv1d),
    "bilinear": ((2, Q, Q), lambda x, w: F.bilinear(x, x, w)),
    "einsum": ((2, Q, Q), lambda x, w: torch.einsum("btq,btr,pqr->btp", x, x, w)),
}


def said_by_the_optimizer(model: nn.Module, **options: Any) -> tuple[list[str], dict[str, str]]:
    """What is said in three steps, and the reasons of the parameters without a block after them."""
    x = torch.randn(5, 3, Q)
    with kfdist.Optimizer(model, **options) as optimizer, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KfdistWarning)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        rows = optimizer.preconditioner.coverage().rows
    said = [str(each.message) for each in caught if issubclass(each.category, KfdistWarning)]
    return said, {row.parameter: row.reason for row in rows if row.block is None}


@pytest.mark.parametrize(("shape", "use"), DISGUISED.values(), ids=DISGUISED.keys())
def test_a_bare_matrix_is_said_once_it_is_seen_in_a_product(
    shape: tuple[int, ...], use: Callable[[Tensor, Tensor], Tensor]
) -> None:
    (said,), reasons = said_by_the_optimizer(Holds(shape, use))
    assert said.startswith("1 parameters have gradients and no block: 'kernel': left to a first-order method: a prod")
    assert "a product with it, or with what is made of it, was seen" in reasons["kernel"]
    assert reasons["positions"] == BARE
    assert not said_by_the_optimizer(Holds(shape, use), skip=("kernel",))[0]


def test_what_is_added_or_scales_is_left_to_adamw_without_a_word() -> None:
    said, reasons = said_by_the_optimizer(Holds((3, Q), lambda x, w: x * (1 + w) - w[None]))
    assert not said and reasons == {"kernel": BARE, "positions": BARE}


class Masked(Holds):
    """Leaves out a part of its matrix, as a buffer says."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__((2, Q), F.linear)
        self.register_buffer("mask", torch.tensor([[1.0], [0.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.layer(x) + self.positions, self.kernel * self.mask)


def test_a_matrix_under_a_mask_is_one() -> None:
    (said,), _ = said_by_the_optimizer(Masked())
    assert "'kernel': left to a first-order method: a product with it" in said
