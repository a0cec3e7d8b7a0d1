"""Models by name."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kfdist.config.fields import by_name
from kfdist.config.named_functions import is_own, own_function, own_result
from kfdist.models.small import DigitsCnn, Mlp
from kfdist.models.torchvision_models import CifarResNet18, CifarVgg16Bn, TorchvisionModel, refuse_architecture

MODELS: Mapping[str, type[DigitsCnn | Mlp | TorchvisionModel | CifarResNet18 | CifarVgg16Bn]] = {
    "digits-cnn": DigitsCnn,
    "mlp": Mlp,
    "torchvision": TorchvisionModel,
    "cifar-resnet18": CifarResNet18,
    "cifar-vgg16bn": CifarVgg16Bn,
}
"""Every model by the name that `model.name` gives it; its fields are the `model.settings`."""


def build_model(
    name: str, settings: Mapping[str, Any], *, example_shape: Sequence[int], classes: int, seed: int
) -> nn.Module:
    """Builds a model by name, or by a function of the user's, on the CPU; the same seed gives the same parameters.

    Torch's global generator is left as it was.

    Raises:
        ConfigError: The name or a setting is unknown or not allowed, the model doesn't fit the data, or the function
            returns something else.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not is_own(name):
            refuse_architecture(name, MODELS)
            return by_name(MODELS, name, settings, section="model").build(example_shape, classes)
        function = own_function(name, section="model")
        shape = tuple(example_shape)
        return own_result(function, settings, wanted=nn.Module, section="model", example_shape=shape, classes=classes)
