"""Models by name."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kfdist.config.named import by_name
from kfdist.models.digits_cnn import DigitsCnn
from kfdist.models.mlp import Mlp

MODELS: Mapping[str, type[DigitsCnn | Mlp]] = {"digits-cnn": DigitsCnn, "mlp": Mlp}
"""Every model by the name that `model.name` gives it; its fields are the `model.settings`."""


def build_model(
    name: str, settings: Mapping[str, Any], *, example_shape: Sequence[int], classes: int, seed: int
) -> nn.Module:
    """Builds a model by name, on the CPU; the same seed gives the same parameters.

    Torch's global generator is left as it was.

    Raises:
        ConfigError: The name or a setting is unknown or not allowed, or the model doesn't fit the data.
    """
    recipe = by_name(MODELS, name, settings, section="model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return recipe.build(example_shape, classes)
