"""What a data set is: tensors in memory, divided into training and test examples."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Labelled examples.

    Attributes:
        inputs: float32 [N, ...].
        labels: int64 [N], from 0.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Returns the number of examples N."""
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A classification task.

    Attributes:
        train: What is trained on.
        test: What is only evaluated on.
        classes: How many classes the labels have.
    """

    train: Examples
    test: Examples
    classes: int

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train.inputs.shape[1:])


def stratified_split(labels: Tensor, test_fraction: float, generator_seed: int) -> tuple[Tensor, Tensor]:
    """Divides examples so that every class has the same share in both parts.

    Args:
        labels: int64 [N].
        test_fraction: Share of each class that goes to the test part, rounded to whole examples, at least one.
        generator_seed: The split depends on this and the labels alone.

    Returns:
        Indices of the training and of the test examples, ascending.
    """
    generator = torch.Generator().manual_seed(generator_seed)
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        count = max(1, round(test_fraction * len(members)))
        test[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~test).nonzero().flatten(), test.nonzero().flatten()
