"""How good the model is on the test data, found out by all ranks together."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfdist.comm.communicator import Communicator
from kfdist.data.objective import Objective
from kfdist.training.evaluation_mode import in_evaluation


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results on the test data.

    Attributes:
        loss: Mean loss over the examples that could be read, for cross entropy in nats; NaN where none could.
        metrics: Means of the objective's metrics over them, likewise.
        examples: How many these are.
    """

    loss: float
    metrics: Mapping[str, float]
    examples: int


def evaluate(
    model: nn.Module,
    share: Iterable[tuple[Tensor, Tensor]],
    objective: Objective,
    communicator: Communicator,
    device: torch.device,
) -> Evaluation:
    """Evaluates, and leaves every module in its mode. All ranks must call this, and get the same result.

    Args:
        model: The model, on the device.
        share: This rank's share of the test examples, in batches.
        objective: The loss and the metrics.
        communicator: The ranks.
        device: The device the ranks communicate on.
    """
    # Sums in float64: of the loss, of the metrics, and the examples.
    sums = torch.zeros(2 + len(objective.metrics), dtype=torch.float64, device=device)
    with in_evaluation(model), torch.no_grad():
        for inputs, targets in share:
            output = model(inputs)
            sums[0] += objective.loss(output, targets).double() * len(targets)
            sums[1:-1] += objective.measure(output, targets).double()
            sums[-1] += len(targets)
    loss, *metrics, examples = communicator.all_reduce_sum_(sums).tolist()
    count = examples or math.nan
    means = {name: total / count for name, total in zip(objective.metrics, metrics, strict=True)}
    return Evaluation(loss=loss / count, metrics=means, examples=round(examples))
