"""Tasks with a target, and who competes on them; `kfdist bench target` lets everyone train everything.

A new task is an entry of `TASKS`; a new rival one of `RIVALS`. `rs-kfac-exact` is there for what savings in
the defaults cost: their medians of steps over some seeds (`--seeds 5`) are to be its own.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfdist.bench.workloads import Batch
from kfdist.capture.requests import Sampling
from kfdist.curvature.inverters import RsKfac
from kfdist.data.sets import Digits
from kfdist.links.local import LocalLink
from kfdist.models.small import DigitsCnn
from kfdist.optim.adaptive import AdaptiveStep
from kfdist.runtime.preconditioner import Preconditioner

Step = Callable[[Batch], None]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be reached.

    Attributes:
        title: What it is, for people.
        metric: What is measured; lower is better.
        goal: The value that counts as reached.
        seconds: Of training, at most.
        batch_size: Examples a step.
        data: Training and test examples.
        build: Makes the model, from torch's global generator.
        loss: Of a model's outputs and targets.
        loss_name: The same, for methods that are told the loss.
        on_test: Whether the metric is the test set's loss; else that of all training examples.
        inputs_are_targets: Whether the model is to return what it was given.
        evaluation_period: Steps between two measurements.
    """

    title: str
    metric: str
    goal: float
    seconds: float
    batch_size: int
    data: Callable[[], tuple[Batch, Batch]]
    build: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    loss_name: str
    on_test: bool = False
    inputs_are_targets: bool = False
    evaluation_period: int = 10

    def model(self, seed: int) -> nn.Module:
        """Makes the model; equal seeds give equal parameters."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build()

    def batches(self, seed: int) -> Iterator[Batch]:
        """Yields batches for ever, each example once an epoch."""
        inputs, targets = self.examples(test=False)
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(inputs), generator=generator)
            for chosen in order.split(self.batch_size):
                if len(chosen) == min(self.batch_size, len(inputs)):
                    yield inputs[chosen], targets[chosen]

    def examples(self, *, test: bool) -> Batch:
        """Returns all inputs with their targets."""
        inputs, targets = self.data()[test]
        return (inputs, inputs) if self.inputs_are_targets else (inputs, targets)

    def value(self, model: nn.Module) -> float:
        """Measures the metric."""
        inputs, targets = self.examples(test=self.on_test)
        model.eval()
        with torch.no_grad():
            value = float(self.loss(model(inputs), targets))
        model.train()
        return value


@cache
def _digits() -> tuple[Batch, Batch]:
    data = Digits().load()
    return (data.train.inputs, data.train.labels), (data.test.inputs, data.test.labels)


@cache
def _flat_digits() -> tuple[Batch, Batch]:
    train, test = _digits()
    return (train[0].flatten(1), train[1]), (test[0].flatten(1), test[1])


def autoencoder(widths: Iterable[int]) -> nn.Sequential:
    """Makes an autoencoder of linear layers with tanh between them.

    Args:
        widths: From the input to the code; the way back is the same.
    """
    down = list(widths)
    sizes = [*down, *down[-2::-1]]
    layers = [module for p, q in zip(sizes, sizes[1:], strict=False) for module in (nn.Linear(p, q), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


TASKS: Mapping[str, Task] = {
    "digits-autoencoder": Task(
        title="digits autoencoder 64-256-128-32-8 and back, tanh, batch 256",
        metric="training MSE",
        goal=0.0022,
        seconds=12.0,
        batch_size=256,
        data=_flat_digits,
        build=lambda: autoencoder((64, 256, 128, 32, 8)),
        loss=F.mse_loss,
        loss_name="mse",
        inputs_are_targets=True,
    ),
    "digits-cnn": Task(
        title="digits CNN, batch 128",
        metric="test loss",
        goal=0.032,
        seconds=12.0,
        batch_size=128,
        data=_digits,
        build=lambda: DigitsCnn().build((1, 8, 8), 10),
        loss=F.cross_entropy,
        loss_name="cross_entropy",
        on_test=True,
        evaluation_period=5,
    ),
}
"""By the name that `--task` gives them."""


@dataclass(frozen=True, kw_only=True)
class Rival:
    """Somebody who trains.

    Attributes:
        title: Who.
        rates: Learning rates to try; one that means nothing to it is 0.
        training: Makes, of a task, its model and a rate, what does a step.
        kfdist: Whether it is of this package.
        whole: Whether its steps are on all training examples.
    """

    title: str
    rates: tuple[float, ...]
    training: Callable[[Task, nn.Module, float], Any] = field(repr=False)
    kfdist: bool = False
    whole: bool = False


def _by(*make: Callable[[nn.Module, float], torch.optim.Optimizer | None]) -> Callable[[Task, nn.Module, float], Any]:
    """Trains with optimizers that share a model's parameters between them."""

    @contextmanager
    def training(task: Task, model: nn.Module, lr: float) -> Iterator[Step]:
        optimizers = [optimizer for each in make if (optimizer := each(model, lr)) is not None]

        def step(batch: Batch) -> None:
            model.zero_grad()
            task.loss(model(batch[0]), batch[1]).backward()
            for optimizer in optimizers:
                optimizer.step()

        yield step

    return training


def _sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def _behind(method: Any, **settings: Any) -> Callable[[Task, nn.Module, float], Any]:
    """Trains with SGD behind a preconditioner that inverts in a thread of its own."""

    @contextmanager
    def training(task: Task, model: nn.Module, lr: float) -> Iterator[Step]:
        optimizer = _sgd(model, lr)
        with Preconditioner(model, method, link=LocalLink(), lr=lr, **settings) as preconditioner:

            def step(batch: Batch) -> None:
                optimizer.zero_grad()
                task.loss(model(batch[0]), batch[1]).backward()
                preconditioner.step()
                optimizer.step()

            yield step

    return training


FIRST_BATCH, GROWING_STEPS = 512, 200
"""The batches of `AdaptiveStep`: they grow from this size to all examples within these steps, as in the K-FAC paper."""


@contextmanager
def _adaptive(task: Task, model: nn.Module, lr: float) -> Iterator[Step]:
    del lr  # it finds its own
    with AdaptiveStep.for_model(model, task.loss_name, link=LocalLink()) as adaptive:
        done = count()

        def closure(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            outputs = model(inputs)
            return outputs, task.loss(outputs, targets)

        def step(batch: Batch) -> None:
            examples = len(batch[0])
            grown = min(next(done) / GROWING_STEPS, 1.0)
            size = min(round(FIRST_BATCH ** (1 - grown) * examples**grown), examples)
            adaptive.step(closure, batch[0][:size], batch[1][:size])

        yield step


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.ndim == 2]


def _muon(model: nn.Module, lr: float) -> torch.optim.Optimizer | None:
    return torch.optim.Muon(_matrices(model), lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


def _rest_by_adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    rest = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    return torch.optim.AdamW(rest, lr=lr, weight_decay=0.0)


def _rivals() -> dict[str, Rival]:
    found = {
        "sgd": Rival(title="SGD, momentum 0.9", rates=(0.03, 0.1, 0.3, 1.0), training=_by(_sgd)),
        "adamw": Rival(
            title="AdamW",
            rates=(1e-3, 3e-3, 1e-2, 3e-2),
            training=_by(lambda model, lr: torch.optim.AdamW(model.parameters(), lr=lr)),
        ),
    }
    if hasattr(torch.optim, "Muon"):
        found["muon"] = Rival(
            title="Muon, AdamW where there is no matrix",
            rates=(1e-3, 3e-3, 1e-2, 3e-2),
            training=_by(_muon, _rest_by_adamw),
        )
    rates = (0.03, 0.1, 0.3)
    return found | {
        "rs-kfac": Rival(title="kfdist: rs-kfac, defaults", rates=rates, training=_behind("rs-kfac"), kfdist=True),
        "rs-kfac-exact": Rival(
            title="the same, all rows of a batch, all 220 eigenpairs",
            rates=rates,
            training=_behind(RsKfac(direction_error=0), sampling=Sampling(examples_fraction=1.0)),
            kfdist=True,
        ),
        "kfac-eigen": Rival(
            title="kfdist: kfac-eigen, periods 2 and 10",
            rates=rates,
            training=_behind("kfac-eigen", factor_period=2, inverse_period=10),
            kfdist=True,
        ),
        "adaptive": Rival(
            title="kfdist: AdaptiveStep, no rate, growing batches",
            rates=(0.0,),
            training=_adaptive,
            kfdist=True,
            whole=True,
        ),
    }


RIVALS: Mapping[str, Rival] = _rivals()
"""By the name that `--rival` gives them."""
