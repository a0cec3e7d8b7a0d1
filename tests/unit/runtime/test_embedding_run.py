"""Tables in a whole run: beside every method, with dense and sparse gradients, and resumed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfdist
from kfdist.linalg.kronecker import split_by_trace
from tests.support.captured_methods import CAPTURED

N, T, V, P, CLASSES, DAMPING = 6, 3, 9, 4, 3, 0.1


def made(*, sparse: bool = False) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    table = nn.Embedding(V, P, sparse=sparse, padding_idx=1)
    model = nn.Sequential(table, nn.Flatten(), nn.Linear(T * P, CLASSES)).double()
    return model, torch.randint(0, V - 2, (N, T)), torch.randint(0, CLASSES, (N,))


def dense_direction(model: nn.Sequential, ids: Tensor, y: Tensor) -> Tensor:
    """(G + lambda_G I)^-1 V (A + lambda_A I)^-1 for one-hot inputs, `[V, p]`."""
    rows = model[0](ids).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model[1:](rows), y, reduction="sum"), rows)
    there = ids != 1
    a, g = F.one_hot(ids[there], V).double(), g[there]
    A, G = a.T @ a / N, g.T @ g / len(g)
    lambda_A, lambda_G = split_by_trace(A.trace(), G.trace(), d_in=V, d_out=P, damping=DAMPING)
    eye = torch.eye(max(V, P), dtype=torch.float64)
    gradient = g.T @ a / N
    left = torch.linalg.solve(G + lambda_G * eye[:P, :P], gradient)
    return torch.linalg.solve(A + lambda_A * eye[:V, :V], left.T)


def step_once(model: nn.Sequential, ids: Tensor, y: Tensor, method: str) -> Tensor:
    arguments: dict[str, Any] = {"damping": DAMPING, "kl_clip": None, "adoption": kfdist.FixedLag(0)}
    with kfdist.Preconditioner(model, method, **arguments) as preconditioner:
        F.cross_entropy(model(ids), y).backward()
        preconditioner.step()
        (row,) = [row for row in preconditioner.coverage().rows if row.parameter == "0.weight"]
        assert row.method == "kfac-diagonal"
    grad = model[0].weight.grad
    assert isinstance(grad, Tensor)
    return grad


@pytest.mark.parametrize(
    "method", [name for name in CAPTURED if name not in ("kfac-tridiagonal", "two-level", "ekfac-adam")]
)
def test_beside_every_method(method: str):
    model, ids, y = made()
    expected = dense_direction(model, ids, y)
    torch.testing.assert_close(step_once(model, ids, y, method), expected)


def test_a_sparse_gradient_stays_sparse_and_sparse_optimizers_take_it():
    model, ids, y = made(sparse=True)
    expected = dense_direction(model, ids, y)
    grad = step_once(model, ids, y, "kfac")
    assert grad.is_sparse
    torch.testing.assert_close(grad.to_dense(), expected)
    weight = next(model.parameters())
    before = weight.detach().clone()
    torch.optim.SGD([weight], lr=0.5).step()
    torch.testing.assert_close(weight.detach(), before - 0.5 * expected)
    torch.optim.SparseAdam([weight]).step()


def test_a_run_goes_on_from_its_state_to_the_bit():
    arguments: dict[str, Any] = {"factor_period": 1, "inverse_period": 2, "lr": 0.1, "adoption": kfdist.FixedLag(1)}

    def steps(model: nn.Sequential, preconditioner: kfdist.Preconditioner, ids: Tensor, y: Tensor) -> list[Tensor]:
        for _ in range(3):
            model.zero_grad()
            F.cross_entropy(model(ids), y).backward()
            preconditioner.step()
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter -= 0.1 * parameter.grad
        return [parameter.detach().clone() for parameter in model.parameters()]

    model, ids, y = made()
    with kfdist.Preconditioner(model, "kfac", **arguments) as preconditioner:
        steps(model, preconditioner, ids, y)
        state, weights = preconditioner.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
        expected = steps(model, preconditioner, ids, y)
    again = made()[0]
    again.load_state_dict(weights)
    with kfdist.Preconditioner(again, "kfac", **arguments) as preconditioner:
        preconditioner.load_state_dict(state)
        for mine, other in zip(steps(again, preconditioner, ids, y), expected, strict=True):
            assert torch.equal(mine, other)
