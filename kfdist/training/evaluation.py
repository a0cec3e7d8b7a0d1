"""How good the model is on the test data, found out by all ranks together."""

from dataclasses import dataclass

import torch
from torch import nn

from kfdist.comm.communicator import Communicator
from kfdist.data.sets import Examples

_BATCH = 512
"""Examples evaluated at once; bounds the memory, changes nothing else."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results on the test data.

    Attributes:
        loss: Mean cross entropy, in nats.
        accuracy: Share of the examples classified correctly.
    """

    loss: float
    accuracy: float


def evaluate(model: nn.Module, examples: Examples, communicator: Communicator, device: torch.device) -> Evaluation:
    """Evaluates; every rank takes a share of the examples. All ranks must call this, and get the same result."""
    share = slice(communicator.rank, None, communicator.world_size)
    inputs, labels = examples.inputs[share], examples.labels[share]
    # Sums in float64, on the device the group communicates on.
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    try:
        with torch.no_grad():
            for first in range(0, len(labels), _BATCH):
                targets = labels[first : first + _BATCH].to(device)
                logits = model(inputs[first : first + _BATCH].to(device))
                sums[0] += nn.functional.cross_entropy(logits, targets, reduction="sum").double()
                sums[1] += (logits.argmax(1) == targets).sum().double()
    finally:
        model.train()
    loss, correct = communicator.all_reduce_sum_(sums).tolist()
    return Evaluation(loss=loss / len(examples), accuracy=correct / len(examples))
