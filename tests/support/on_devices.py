"""Small trainings that are the same on every device, but for rounding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfdist
from kfdist.curvature.inverters import INVERTERS
from tests.support.small_models import images, small_cnn

Batch = tuple[Tensor, Tensor]

over_methods = pytest.mark.parametrize(
    ("device", "method"),
    [("cpu", "rs-kfac"), ("cpu", "eva")] + [pytest.param("cuda", name, marks=pytest.mark.gpu) for name in INVERTERS],
    indirect=["device"],
)
"""Every method on a GPU, two of them on a CPU, one of the service and one of the ranks themselves."""

JOINING = ("kfac-tridiagonal", "two-level")
"""Methods that join layers."""


class MeanOfSequence(nn.Module):
    """A recurrent network or a transformer's layer, and a head on the mean of its positions."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.head((y[0] if isinstance(y, tuple) else y).mean(1))


def _sequences(n: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=generator)


def _numbers(n: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 7, (n, 4), generator=generator), torch.randint(0, 3, (n,), generator=generator)


def _images(n: int, seed: int) -> Batch:
    return images(n, seed=seed)


def _normalised() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        *(nn.ConvTranspose2d(8, 4, 2, stride=2), nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(16, 3)),
    )


def _layers() -> nn.Module:
    """What the methods that join layers can take whole: linear layers, and convolutions that aren't grouped."""
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Batch]]] = {
    "convolutions": (small_cnn, _images),
    "layers": (_layers, _images),
    "norms": (_normalised, _images),
    "lstm": (lambda: MeanOfSequence(nn.LSTM(8, 6, batch_first=True), 6), _sequences),
    "transformer": (
        lambda: MeanOfSequence(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 8),
        _sequences,
    ),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 6), nn.Flatten(), nn.Linear(24, 3)), _numbers),
    "sparse embedding": (
        lambda: nn.Sequential(nn.Embedding(7, 6, sparse=True), nn.Flatten(), nn.Linear(24, 3)),
        _numbers,
    ),
}
"""What has kernels of its own on a GPU: what makes a model, and what makes its n-th batch."""


class Trained:
    """A model of `MODELS` on a device, its preconditioner, and steps of SGD on batches drawn on the CPU."""

    def __init__(
        self, device: torch.device, name: str = "convolutions", method: Any = "kfac-eigen", **given: Any
    ) -> None:
        make, self.batch = MODELS[name]
        torch.manual_seed(0)
        self.device = device
        self.model = make().double().to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        settings = {"damping": 0.1, "factor_period": 1, "inverse_period": 2, "adoption": kfdist.FixedLag(0), "lr": 0.05}
        self.pre = kfdist.Preconditioner(self.model, method, **(settings | given))

    def forward_and_backward(self, seed: int, parts: int = 1, n: int = 8) -> None:
        self.optimizer.zero_grad()
        x, y = self.resident(seed, n)
        for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (nn.functional.cross_entropy(self.model(xs), ys) / parts).backward()

    def resident(self, seed: int, n: int = 8) -> Batch:
        """A batch on the device."""
        x, y = self.batch(n, seed)
        return x.to(self.device), y.to(self.device)

    def step(self, seed: int, parts: int = 1) -> kfdist.StepReport:
        self.forward_and_backward(seed, parts)
        report = self.pre.step()
        self.optimizer.step()
        return report

    def parameters(self) -> Tensor:
        return torch.cat([parameter.detach().cpu().flatten() for parameter in self.model.parameters()])
