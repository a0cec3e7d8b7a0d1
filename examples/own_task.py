"""A model and data of your own: `kfdist train examples/own_task.toml`, from the repository's root.

The task: the phase of a wave of known frequency, from noisy samples. `docs/own-tasks.md` says what functions return.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfdist.data import DataSet, Objective


@dataclass(frozen=True)
class Waves:
    """A map-style data set: `waves[index]` is (samples, (cos, sin) of the phase).

    The wave depends on the index. The noise is drawn from torch's global generator, which kfdist seeds from the run's
    seed, the epoch and the index before each call: each epoch has other noise, and a resumed run has the same.
    """

    first: int
    count: int
    noise: float

    def __len__(self) -> int:
        """Returns how many waves there are."""
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Draws a wave."""
        phase = torch.tensor(2.4 * (self.first + index))
        samples = torch.sin(torch.linspace(0, 12, 48) + phase)
        return samples + self.noise * torch.randn(48), torch.stack([phase.cos(), phase.sin()])


class SquaredError(Objective):
    """Half the squared distance from the target, and the distance."""

    metrics = ("distance",)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Returns the mean over the batch."""
        return 0.5 * (output - target).square().sum(1).mean()

    def measure(self, output: Tensor, target: Tensor) -> Tensor:
        """Returns the sum over the batch, of each metric."""
        return (output - target).norm(dim=1).sum()[None]

    def observation(self, target: Tensor) -> dict[str, Any] | None:
        """Returns None: torch's MSELoss has another factor, so that fisher = "mc" and "exact" aren't offered."""
        return None


def data(noise: float = 0.3) -> DataSet:
    """Makes the data set; `data.settings` are the arguments."""
    return DataSet(train=Waves(0, 400, noise), test=Waves(400, 100, noise), classes=2, objective=SquaredError())


def model(example_shape: tuple[int, ...], classes: int, width: int = 32) -> nn.Module:
    """Makes the model, initialised from torch's generator; `model.settings` are the arguments after the first two."""
    (samples,) = example_shape
    return nn.Sequential(
        nn.Linear(samples, width),
        nn.Tanh(),
        nn.Dropout(0.05),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, classes),
    )
