"""Who competes on the tasks of `kfdist bench target`; a new one is an entry of `RIVALS`.

`rs-kfac-exact` is there for what savings in the defaults cost: its median of steps is to be that of `rs-kfac`.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from kfdist.bench.contest_tasks import Task
from kfdist.bench.workloads import Batch
from kfdist.capture.requests import Sampling
from kfdist.curvature.inverters import RsKfac
from kfdist.links.local import LocalLink
from kfdist.optim.adaptive import AdaptiveStep
from kfdist.optim.optimizer import Optimizer
from kfdist.policies.staleness import FixedLag
from kfdist.runtime.preconditioner import Preconditioner

Step = Callable[[Batch], None]


@dataclass(frozen=True, kw_only=True)
class Rival:
    """Somebody who trains.

    Attributes:
        title: Who.
        rates: Learning rates to tune over, growing; one that means nothing to it is 0.
        training: Makes, of a task, its model and a rate, what does a step.
        kfdist: Whether it is of this package.
        whole: Whether its steps are on all training examples.
        rate_of: Whose best rate it takes instead of being tuned.
    """

    title: str
    rates: tuple[float, ...]
    training: Callable[[Task, nn.Module, float], Any] = field(repr=False)
    kfdist: bool = False
    whole: bool = False
    rate_of: str = ""


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
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, fused=True)


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


def _optimizer(**settings: Any) -> Callable[[Task, nn.Module, float], Any]:
    """Trains with `kfdist.Optimizer`, which inverts in a thread of its own."""

    @contextmanager
    def training(task: Task, model: nn.Module, lr: float) -> Iterator[Step]:
        with Optimizer(model, lr=lr, link=LocalLink(), **settings) as optimizer:

            def step(batch: Batch) -> None:
                optimizer.zero_grad()
                task.loss(model(batch[0]), batch[1]).backward()
                optimizer.step()

            yield step

    return training


def _soap(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(model.parameters(), lr=lr, weight_decay=0.0)


def _shampoo(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Makes Shampoo with SGD's lengths, whose roots are as new as SOAP's bases."""
    from pytorch_optimizer import ScalableShampoo

    return ScalableShampoo(
        model.parameters(), lr=lr, betas=(0.9, 0.999), start_preconditioning_step=10, preconditioning_compute_steps=10
    )


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.ndim == 2]


def _muon(model: nn.Module, lr: float) -> torch.optim.Optimizer | None:
    return torch.optim.Muon(_matrices(model), lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


def _rest_by_adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    rest = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    return torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, fused=True)


_RATES = {"sgd": (0.03, 0.1, 0.3, 1.0), "adamw": (1e-3, 3e-3, 1e-2, 3e-2)}
"""What is tuned over: those of methods that go by SGD's rate, and by AdamW's."""


def _others() -> Iterator[tuple[str, Rival]]:
    yield "sgd", Rival(title="SGD, momentum 0.9", rates=_RATES["sgd"], training=_by(_sgd))
    # Fused, as the fastest form that torch has of them on a CPU.
    adamw = _by(lambda model, lr: torch.optim.AdamW(model.parameters(), lr=lr, fused=True))
    yield "adamw", Rival(title="AdamW", rates=_RATES["adamw"], training=adamw)
    if hasattr(torch.optim, "Muon"):
        training = _by(_muon, _rest_by_adamw)
        yield "muon", Rival(title="Muon, AdamW where there is no matrix", rates=_RATES["adamw"], training=training)
    if importlib.util.find_spec("pytorch_optimizer") is not None:
        yield "soap", Rival(title="SOAP, period 10", rates=_RATES["adamw"], training=_by(_soap))
        yield "shampoo", Rival(title="Shampoo, period 10, SGD's lengths", rates=_RATES["sgd"], training=_by(_shampoo))
    # What public synchronous implementations do and set by default, with this package's products.
    synchronous = _behind(
        "kfac-eigen", adoption=FixedLag(0), factor_period=1, inverse_period=10, damping=1e-3, kl_clip=1e-3
    )
    yield "synchronous", Rival(title="synchronous K-FAC, periods 1 and 10", rates=_RATES["sgd"], training=synchronous)


def _own() -> Iterator[tuple[str, Rival]]:
    exact = _behind(RsKfac(direction_error=0), sampling=Sampling(examples_fraction=1.0))
    for name, title, rates, training in [
        ("rs-kfac", "rs-kfac, defaults, SGD", _RATES["sgd"], _behind("rs-kfac")),
        ("rs-kfac-exact", "the same, all rows of a batch, all 220 eigenpairs", _RATES["sgd"], exact),
        (
            "kfac-eigen",
            "kfac-eigen, periods 2 and 10, SGD",
            _RATES["sgd"],
            _behind("kfac-eigen", factor_period=2, inverse_period=10),
        ),
        ("optimizer-tuned", "Optimizer, its own best rate", _RATES["adamw"], _optimizer()),
    ]:
        yield name, Rival(title=f"kfdist: {title}", rates=rates, training=training, kfdist=True)
    yield (
        "optimizer",
        Rival(
            title="kfdist: Optimizer, defaults, AdamW's rate",
            rates=(),
            training=_optimizer(),
            kfdist=True,
            rate_of="adamw",
        ),
    )
    yield (
        "adaptive",
        Rival(
            title="kfdist: AdaptiveStep, no rate, growing batches",
            rates=(0.0,),
            training=_adaptive,
            kfdist=True,
            whole=True,
        ),
    )


RIVALS: Mapping[str, Rival] = dict([*_others(), *_own()])
"""By the name that `--rival` gives them; those of other packages first, where they are installed."""
