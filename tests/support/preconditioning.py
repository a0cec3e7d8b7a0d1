"""A small synchronous Preconditioner and its statistics, for tests of everything around it."""

from typing import Any

import torch
from torch import Tensor, nn

import kfdist
from kfdist.linalg.psd import unpack_triangle
from tests.support.factors import Factors

DEFAULTS: dict[str, Any] = {
    "damping": 0.1,
    "factor_period": 1,
    "inverse_period": 1,
    "kl_clip": 1e-3,
    "lr": 0.1,
    "adoption": kfdist.FixedLag(0),
}


def preconditioner(model: nn.Module, method: Any = "kfac-eigen", **changes: Any) -> kfdist.Preconditioner:
    """Measures and inverts at every step, and waits for it."""
    return kfdist.Preconditioner(model, method, **{**DEFAULTS, **changes})


def two_layers(seed: int = 0) -> nn.Sequential:
    """Four inputs, three classes, float64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def rows(n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A batch for `two_layers`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator, dtype=torch.float64), torch.randint(0, 3, (n,), generator=generator)


def backward(model: nn.Module, n: int = 8, seed: int = 0, scale: float = 1.0) -> float:
    """One backward of the mean loss; returns it."""
    x, y = rows(n, seed)
    loss = nn.functional.cross_entropy(model(x), y)
    (loss * scale).backward()
    return loss.item()


def factors(pre: kfdist.Preconditioner) -> Factors:
    """This rank's (Omega, Gamma) by block; blocks without any statistics are left out."""
    sums = pre.state_dict()["sums"]
    return {
        name: (unpack_triangle(each["A"] / each["n_examples"]), unpack_triangle(each["G"] / each["n_positions"]))
        for name, each in sums.items()
        if each["n_examples"]
    }


def gradients(model: nn.Module) -> list[Tensor]:
    """Copies of the gradients of a model whose parameters all have one."""
    copies = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    assert len(copies) == len(list(model.parameters()))
    return copies
