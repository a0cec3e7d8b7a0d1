"""Blocks of units in a whole run: beside every method, inverted by the ranks, and left alone where they must be."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfdist
from kfdist.errors import KfdistWarning
from tests.support.captured_methods import CAPTURED

N, D, CLASSES = 8, 5, 3
DAMPING = 0.1


class Net(nn.Module):
    """Two layers with a norm and a bare scale between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, CLASSES)
        self.gamma = nn.Parameter(torch.full((D,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))) * self.gamma)


def made(seed: int = 0) -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = Net().double()
    return model, torch.randn(N, D, dtype=torch.float64), torch.randint(0, CLASSES, (N,))


def dense_directions(model: Net, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """(F_c + lambda I)^-1 grad of the norm and of the bare scale, example by example."""
    parameters = [model.norm.weight, model.norm.bias, model.gamma]
    rows = [torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), parameters) for i in range(N)]
    v = torch.stack([torch.stack(row[:2], dim=-1) for row in rows])
    fisher = torch.einsum("nci,ncj->cij", v, v) / N + DAMPING * torch.eye(2, dtype=v.dtype)
    norm = torch.linalg.solve(fisher, v.mean(0).unsqueeze(-1)).squeeze(-1)
    scale = torch.stack([row[2] for row in rows])
    return {"weight": norm[:, 0], "bias": norm[:, 1], "gamma": scale.mean(0) / (scale.square().mean(0) + DAMPING)}


@pytest.mark.parametrize("method", [*(name for name in CAPTURED if name != "ekfac-adam"), "auto"])
def test_units_are_preconditioned_exactly_beside_every_method(method: str):
    model, x, y = made()
    expected = dense_directions(model, x, y)
    table = {"first": method, "*": "kfac"} if method == "kfac-tridiagonal" else method
    with kfdist.Preconditioner(model, table, damping=DAMPING, kl_clip=None) as preconditioner:
        F.cross_entropy(model(x), y).backward()
        preconditioner.step()
        assert preconditioner.coverage().share == 1.0
    torch.testing.assert_close(model.norm.weight.grad, expected["weight"])
    torch.testing.assert_close(model.norm.bias.grad, expected["bias"])
    torch.testing.assert_close(model.gamma.grad, expected["gamma"])


def test_units_have_no_job_no_owner_and_no_column():
    model, x, y = made()
    with kfdist.Preconditioner(model, "kfac", kl_clip=None) as preconditioner:
        groups = {group.name: group.own for group in preconditioner.groups}
        assert groups == {"first": False, "norm": True, "last": False, "gamma": True}
        for _ in range(2):
            F.cross_entropy(model(x), y).backward()
            preconditioner.step()
        assert preconditioner.counters()["inversions"]["by_method"] == {"kfac": 2, "unit-wise": 2}
        assert set(preconditioner.versions().values()) == {0}


def test_a_run_goes_on_from_its_state_to_the_bit():
    model, x, y = made()

    def steps(model: Net, preconditioner: kfdist.Preconditioner, count: int) -> list[Tensor]:
        for _ in range(count):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            preconditioner.step()
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter -= 0.1 * parameter.grad
        return [parameter.detach().clone() for parameter in model.parameters()]

    arguments: dict[str, Any] = {"factor_period": 1, "inverse_period": 2, "lr": 0.1, "adoption": kfdist.FixedLag(0)}
    with kfdist.Preconditioner(model, "kfac", **arguments) as preconditioner:
        steps(model, preconditioner, 3)
        state, weights = preconditioner.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
        expected = steps(model, preconditioner, 3)
    again = made()[0]
    again.load_state_dict(weights)
    with kfdist.Preconditioner(again, "kfac", **arguments) as preconditioner:
        preconditioner.load_state_dict(state)
        for mine, other in zip(steps(again, preconditioner, 3), expected, strict=True):
            assert torch.equal(mine, other)


class Gathers(Net):
    """Uses its bare parameter in a way that can't be measured."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))) * self.gamma[torch.arange(D)])


def test_a_parameter_that_cannot_be_measured_keeps_its_plain_gradient_and_that_is_said_once():
    torch.manual_seed(0)
    model = Gathers().double()
    x, y = torch.randn(N, D, dtype=torch.float64), torch.randint(0, CLASSES, (N,))
    with kfdist.Preconditioner(model, "kfac", lr=1e3, factor_period=2, inverse_period=2) as preconditioner:
        assert preconditioner.coverage().share == 1.0
        F.cross_entropy(model(x), y).backward()
        plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
        with pytest.warns(KfdistWarning, match="gamma.*lookup of rows by number"):
            preconditioner.step()
        assert torch.equal(model.gamma.grad, plain["gamma"])  # pyright: ignore[reportArgumentType]
        assert not torch.equal(model.norm.weight.grad, plain["norm.weight"])  # pyright: ignore[reportArgumentType]
        trained = sum(parameter.numel() for parameter in model.parameters())
        assert preconditioner.coverage().share == pytest.approx(1 - D / trained)
        assert "gamma" in str(preconditioner.coverage())
        for _ in range(3):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            preconditioner.step()
            assert preconditioner.coverage().share == pytest.approx(1 - D / trained)
