"""An inverse multiplied onto the rows of a batch gives the direction it gives of the gradient (algorithms.md 4.3)."""

from typing import Any

import pytest
import torch
from torch import nn

import kfdist
from kfdist.curvature.inverse import KroneckerSpectrum
from kfdist.curvature.inverters import make_inverter
from kfdist.errors import ConfigError

EXACT = 1e-10
"""float64; both sides multiply the same few factors in another order."""


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(60, 50), nn.Tanh(), nn.Linear(50, 30)).double()


def preconditioner(net: nn.Module, apply_to: str, **arguments: Any) -> kfdist.Preconditioner:
    defaults: dict[str, Any] = {"damping": 0.1, "factor_period": 2, "inverse_period": 4, "kl_clip": 1e-2, "lr": 0.1}
    inverter = make_inverter("b-kfac", rank=8, increment_rows=32, apply_to=apply_to)
    return kfdist.Preconditioner(net, inverter, **{**defaults, "adoption": kfdist.FixedLag(2), **arguments})


def trained(apply_to: str, micro_batches: int) -> list[torch.Tensor]:
    net = model()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(3)
    with preconditioner(net, apply_to) as pre:
        for _ in range(5):
            optimizer.zero_grad()
            for _ in range(micro_batches):
                x, y = (torch.randn(10, d, generator=generator, dtype=torch.float64) for d in (60, 30))
                (nn.functional.mse_loss(net(x), y) / micro_batches).backward()
            pre.step()
            optimizer.step()
    return [parameter.detach() - first for parameter, first in zip(net.parameters(), before, strict=True)]


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_rows_give_the_direction_that_the_gradient_gives(micro_batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    of_gradient = trained("gradient", micro_batches)
    used: list[int] = []
    apply_to_rows = KroneckerSpectrum.apply_to_rows

    def counted(self: KroneckerSpectrum, a: torch.Tensor, *rest: Any) -> torch.Tensor:
        used.append(a.shape[1])
        return apply_to_rows(self, a, *rest)

    monkeypatch.setattr(KroneckerSpectrum, "apply_to_rows", counted)
    of_rows = trained("rows", micro_batches)
    assert used == [10 * micro_batches] * 10  # five steps, two layers: never the gradient
    for found, expected in zip(of_rows, of_gradient, strict=True):
        torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"fisher": "mc"}, "measures other gradients"),
        ({"grad_scaler": torch.amp.GradScaler("cpu")}, "scales the gradients"),
    ],
)
def test_rows_are_refused_where_the_gradient_is_not_the_batchs_own(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        preconditioner(model(), "rows", **arguments)


def test_rows_need_a_damping_rule_that_splits() -> None:
    with pytest.raises(ConfigError, match="doesn't split"):
        make_inverter("b-kfac", apply_to="rows", damping_rule="common")
