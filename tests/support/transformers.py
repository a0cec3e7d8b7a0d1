"""Small transformers as the benchmark for GPUs trains them, in bfloat16 autocast, stepped by kfdist."""

from typing import Any

import torch
from torch import Tensor, nn

import kfdist
from benchmarks.gpu_tasks import TINY, Task

PERIODS: dict[str, Any] = {"factor_period": 2, "inverse_period": 4}
METHODS = ("kfdist.Optimizer", "rs-kfac")


class Transformer:
    """A training; a context that ends its preconditioner.

    Args:
        name: A key of `benchmarks.gpu_tasks.TINY`.
        device: Where.
        method: One of `METHODS`.
    """

    def __init__(self, name: str, device: torch.device, method: str) -> None:
        self.task = Task(TINY[name], device)
        self.model = self.task.make()
        if method == "kfdist.Optimizer":
            # Factors with few eigenvectors, and a head that is too wide for a block, as in models of a usual size.
            bases = kfdist.EkfacAdam(rank=2)
            by_width = kfdist.ByWidth(dense=bases, wide=bases, eigen=16, sketched=64)
            optimizer = kfdist.Optimizer(self.model, lr=1e-3, method=by_width, **PERIODS)
            self.optimizer, self.pre = optimizer, optimizer.preconditioner
        else:
            training = self.task.training
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=training.sgd_lr)
            self.pre = kfdist.Preconditioner(self.model, method, skip=training.skip, **PERIODS).attach(self.optimizer)

    def __enter__(self) -> "Transformer":
        return self

    def __exit__(self, *error: object) -> None:
        self.pre.close()

    def step(self) -> Tensor:
        """Trains a step; returns the loss."""
        self.optimizer.zero_grad()
        loss = self.task.backward(self.model)
        self.optimizer.step()
        return loss

    def evaluate(self) -> None:
        """Runs the model as for a validation, where attention has a kernel of its own."""
        self.model.eval()
        with torch.no_grad():
            self.model(self.task.batch[0])
        self.model.train()


def float64_loss(model: nn.Module, task: Task) -> Tensor:
    """Returns the loss of a model in float64 on a task's batch."""
    x, y = task.batch
    inputs = x.double() if x.is_floating_point() else x
    return nn.functional.cross_entropy(model(inputs).flatten(0, -2), y.flatten())
