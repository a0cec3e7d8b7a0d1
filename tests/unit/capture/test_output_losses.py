"""Roots of the Hessian in the output, against the dense Hessian of torch's own loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kfdist.capture.losses import OutputLoss, divisor, enumerated_roots, sampled_root
from kfdist.errors import ConfigError

EXACT = 1e-12
"""float64, a sum over at most 30 outer products of small vectors."""

DRAWS = 4000
MONTE_CARLO = 5.0
"""Standard errors by which a mean over `DRAWS` draws may miss; the seeds are fixed."""

EXAMPLES = 3
SHARES = torch.tensor([0.5, 2.0, 1.5, 0.25], dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape: int, ignored: int | None = None) -> Tensor:
    drawn = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(1))
    if ignored is not None:
        drawn.view(-1)[1] = ignored
    return drawn


@dataclass
class Case:
    """One loss of torch and the arguments that describe it to us."""

    name: str
    shape: tuple[int, ...]
    loss: Callable[..., Tensor]
    arguments: dict[str, Any]


def ce(shape: tuple[int, ...], target: Tensor, **arguments: Any) -> Case:
    return Case("cross_entropy", shape, F.cross_entropy, {"target": target, **arguments})


def bce(**arguments: Any) -> Case:
    target = (normal(3, 4, seed=5) > 0).double()
    return Case("binary_cross_entropy", (3, 4), F.binary_cross_entropy_with_logits, {"target": target, **arguments})


CASES = {
    "ce": ce((3, 4), labels(3)),
    "ce sum": ce((3, 4), labels(3), reduction="sum"),
    "ce smoothed": ce((3, 4), labels(3), label_smoothing=0.3),
    "ce positions": ce((3, 4, 2), labels(3, 2)),
    "ce two-dimensional positions": ce((3, 4, 2, 1), labels(3, 2, 1)),
    "ce ignored": ce((3, 4, 2), labels(3, 2, ignored=-100)),
    "ce ignored otherwise": ce((3, 4, 2), labels(3, 2, ignored=3), ignore_index=3),
    "ce weighted": ce((3, 4), labels(3), weight=SHARES),
    "ce all at once": ce((3, 4, 2), labels(3, 2, ignored=-100), weight=SHARES, label_smoothing=0.2),
    "ce probabilities": ce((3, 4), torch.softmax(normal(3, 4, seed=3), 1), label_smoothing=0.2),
    "ce weighted probabilities": ce((3, 4, 2), torch.softmax(normal(3, 4, 2, seed=3), 1), weight=SHARES),
    "mse": Case("mse", (3, 4), F.mse_loss, {"target": normal(3, 4, seed=2)}),
    "mse sum": Case("mse", (3, 4), F.mse_loss, {"target": normal(3, 4, seed=2), "reduction": "sum"}),
    "mse positions": Case("mse", (3, 2, 4), F.mse_loss, {"target": normal(3, 2, 4, seed=2)}),
    "bce": bce(),
    "bce sum": bce(reduction="sum"),
    "bce pos_weight": bce(pos_weight=SHARES),
    "bce weight": bce(weight=SHARES, pos_weight=SHARES.flip(0)),
}


def hessian(case: Case, output: Tensor) -> Tensor:
    """Of torch's own loss, [numbers, numbers]."""
    dense = torch.autograd.functional.hessian(lambda z: case.loss(z, **case.arguments), output)
    assert isinstance(dense, Tensor)
    return dense.reshape(output.numel(), output.numel())


def of_same_example(output: Tensor) -> Tensor:
    example = torch.arange(EXAMPLES).repeat_interleave(output.numel() // EXAMPLES)
    return example[:, None] == example[None, :]


def described(case: Case) -> OutputLoss:
    return OutputLoss(name=case.name, **case.arguments)


@pytest.mark.parametrize("name", CASES)
def test_enumeration_is_the_hessian(name: str):
    case = CASES[name]
    output = normal(*case.shape, seed=7)
    dense, loss = hessian(case, output), described(case)
    total = torch.zeros_like(dense)
    for u in enumerated_roots(output, loss, EXAMPLES):
        assert u.shape == output.shape
        total += torch.outer(u.flatten(), u.flatten())
    total = total / divisor(output, loss) * of_same_example(output)
    torch.testing.assert_close(total, dense, rtol=0, atol=EXACT)
    assert dense.abs().max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_the_mean_of_draws_is_the_hessian(name: str):
    case = CASES[name]
    output = normal(*case.shape, seed=7)
    dense = hessian(case, output)
    repeated = output.repeat(DRAWS, *(1,) * (output.dim() - 1))
    target = case.arguments["target"]
    target = target.repeat(DRAWS, *(1,) * (target.dim() - 1))
    loss = OutputLoss(name=case.name, **{**case.arguments, "target": target})
    draws = sampled_root(repeated, loss, torch.Generator().manual_seed(0)).reshape(DRAWS, -1)
    products = draws.unsqueeze(1) * draws.unsqueeze(2) / divisor(output, described(case))
    error = products.std(0) / DRAWS**0.5
    missed = ((products.mean(0) - dense).abs() - MONTE_CARLO * error).max()
    assert missed <= 1e-12, f"off by {missed} beyond {MONTE_CARLO} standard errors"


def test_a_single_example_without_its_dimension():
    output, target = normal(4), torch.tensor(2)
    case = ce((4,), target)
    loss = described(case)
    total = sum(torch.outer(u, u) for u in enumerated_roots(output, loss, 4))
    torch.testing.assert_close(total / divisor(output, loss), hessian(case, output), rtol=0, atol=EXACT)


def test_a_batch_of_ignored_targets_is_zero():
    loss = OutputLoss(name="cross_entropy", target=torch.full((3,), -100))
    output = normal(3, 4)
    generator = torch.Generator().manual_seed(0)
    assert (sampled_root(output, loss, generator) / divisor(output, loss) == 0).all()


@pytest.mark.parametrize("name", ["cross_entropy", "mse", "binary_cross_entropy"])
def test_half_precision_outputs_are_worked_on_in_float32(name: str):
    output = normal(3, 4)
    loss = OutputLoss(name=name)
    u = sampled_root(output.to(torch.bfloat16), loss, torch.Generator().manual_seed(0))
    expected = sampled_root(output.to(torch.bfloat16).double(), loss, torch.Generator().manual_seed(0))
    assert u.dtype == torch.bfloat16
    torch.testing.assert_close(u.double(), expected, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "nll"}, "choose one of 'cross_entropy', 'mse'"),
        ({"name": "mse", "reduction": "none"}, "'mean', 'sum'"),
        ({"name": "cross_entropy", "label_smoothing": 1.5}, r"at least 0 and at most 1"),
        ({"name": "mse", "label_smoothing": 0.1}, "belongs to cross_entropy"),
        ({"name": "mse", "weight": SHARES}, "leave them out"),
        ({"name": "cross_entropy", "pos_weight": SHARES}, "belongs to binary_cross_entropy"),
        ({"name": "cross_entropy", "weight": SHARES}, "give target="),
        ({"name": "binary_cross_entropy", "pos_weight": SHARES}, "give target="),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        OutputLoss(**arguments)


@pytest.mark.parametrize(
    "loss",
    [
        OutputLoss(name="cross_entropy", target=labels(4)),
        OutputLoss(name="cross_entropy", target=normal(3, 5)),
        OutputLoss(name="binary_cross_entropy", target=normal(3), pos_weight=SHARES),
    ],
)
def test_targets_that_do_not_fit_are_refused(loss: OutputLoss):
    with pytest.raises(ConfigError, match="target has shape"):
        sampled_root(normal(3, 4), loss, torch.Generator())
