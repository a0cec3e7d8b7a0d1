"""A small synchronous `kfdist.Optimizer`, for tests of it and of what goes around it."""

from typing import Any

import torch
from torch import Tensor, nn

import kfdist
from tests.support.preconditioning import rows

LR, BETAS, EPS, DECAY = 0.02, (0.8, 0.95), 1e-6, 0.1

SYNCHRONOUS: dict[str, Any] = {
    "method": "kfac-eigen",
    "damping": 0.1,
    "factor_period": 1,
    "inverse_period": 1,
    "adoption": kfdist.FixedLag(0),
}


def small_model() -> nn.Sequential:
    """Two linear layers around a norm, float64."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).double()


def optimizer_of(model: nn.Module, **changes: Any) -> kfdist.Optimizer:
    chosen = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, **SYNCHRONOUS, **changes}
    return kfdist.Optimizer(model, **chosen)


def backward(model: nn.Module, seed: int) -> Tensor:
    x, y = rows(seed=seed)
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> list[Tensor]:
    for seed in range(steps):
        backward(model, seed)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]
