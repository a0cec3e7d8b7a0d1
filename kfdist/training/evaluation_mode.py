"""Modules in evaluation for a while, each put back into the mode that it had."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Has a model and all of its modules evaluate inside; a part that was frozen in evaluation stays there afterwards.

    Args:
        model: The model.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        _put_back(modes)


def _put_back(modes: Mapping[nn.Module, bool]) -> None:
    # By train(), as some models do more there: merge their weights for evaluation, and undo that. Parents come first.
    for module, training in modes.items():
        if module.training != training:
            module.train(training)
    for module, training in modes.items():
        module.training = training
