"""What is minimised, and what is measured beside it: the part of a task that its examples don't say."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override


class Objective(ABC):
    """The loss of a batch, and its metrics; derive from it for an objective of your own.

    Attributes:
        metrics: Names of what `measure` returns, the most important first. One that ends in "accuracy" is a share,
            shown in percent.
    """

    metrics: tuple[str, ...] = ()

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Returns the mean loss over the batch's examples, a scalar with a gradient."""

    def measure(self, output: Tensor, target: Tensor) -> Tensor:
        """Returns the sum over the batch's examples of each metric: [len(metrics)], on the output's device.

        A metric of many examples is the mean of theirs: ranks and batches are added up.
        """
        del target
        return torch.zeros(0, dtype=torch.float64, device=output.device)

    def observation(self, target: Tensor) -> Mapping[str, Any] | None:
        """Returns the arguments of `kfdist.Preconditioner.observe` beside the output, for fisher = "mc" and "exact".

        None, the default: the loss is none of those that it knows, and these two Fisher matrices are refused.
        """
        del target
        return None


@dataclass(frozen=True, kw_only=True)
class Classification(Objective):
    """Cross entropy, and the share of the examples whose class has the largest logit.

    Attributes:
        label_smoothing: Share of the target's probability that is spread over all classes.
        top5: Whether the share of the examples whose class is among the five largest logits is measured too.
    """

    label_smoothing: float = 0.0
    top5: bool = False

    @property
    def metrics(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the metrics."""
        return ("accuracy", "top5_accuracy") if self.top5 else ("accuracy",)

    @override
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target, label_smoothing=self.label_smoothing)

    @override
    def measure(self, output: Tensor, target: Tensor) -> Tensor:
        correct = [(output.argmax(1) == target).sum()]
        if self.top5:
            best = output.topk(min(5, output.shape[1]), dim=1).indices
            correct.append((best == target[:, None]).any(1).sum())
        return torch.stack(correct).double()

    @override
    def observation(self, target: Tensor) -> Mapping[str, Any]:
        return {"loss": "cross_entropy", "label_smoothing": self.label_smoothing}
