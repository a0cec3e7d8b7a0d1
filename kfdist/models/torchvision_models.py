"""Models of torchvision, by name; it loads also beside a CPU-only torch (`kfdist.vision`)."""

from collections.abc import Collection, Sequence
from typing import Any, Literal

from pydantic import Field
from torch import nn

from kfdist import checks
from kfdist.config.fields import Section, Settings
from kfdist.errors import ConfigError, KfdistError
from kfdist.vision import import_torchvision


class TorchvisionModel(Section):
    """Settings of a classifier of torchvision, from its own initialisation; nothing is downloaded."""

    architecture: str = Field(default="resnet50", min_length=1, description="a classifier of torchvision.models")
    arguments: Settings = Field(
        default_factory=dict, description="arguments of its function, such as zero_init_residual = true for a ResNet"
    )

    def build(self, example_shape: Sequence[int], classes: int) -> nn.Module:
        """Makes the network, initialised from torch's global generator.

        Raises:
            ConfigError: There is no such architecture or argument.
        """
        del example_shape
        models = import_torchvision().models
        known = models.list_models(module=models)
        name = checks.choice("model.settings.architecture", self.architecture, known)
        try:
            return models.get_model_builder(name)(weights=None, num_classes=classes, **self.arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"is {dict(self.arguments)!r}; torchvision's {name} refuses it: {error}",
                path="model.settings.arguments",
            ) from None


def refuse_architecture(name: str, models: Collection[str]) -> None:
    """Refuses the name of a classifier of torchvision in the place of a model's, with where it goes.

    Args:
        name: The name as configured.
        models: The names of models.

    Raises:
        ConfigError: It is one. Where torchvision can't be imported nothing is.
    """
    if name in models:
        return
    try:
        torchvision = import_torchvision()
    except (KfdistError, ImportError, OSError, RuntimeError):  # not installed, or broken: the name is unknown anyway
        return
    if name in torchvision.models.list_models(module=torchvision.models):
        raise ConfigError(
            f'is {name!r}, a classifier of torchvision; set model.name = "torchvision" and '
            f'model.settings.architecture = "{name}"',
            path="model.name",
        )


class CifarResNet18(Section):
    """Settings of ResNet-18 for images of 32 x 32: the first convolution is 3 x 3 without stride or pooling."""

    zero_init_residual: bool = Field(
        default=False, description="whether the last normalisation of each block starts at 0"
    )

    def build(self, example_shape: Sequence[int], classes: int) -> nn.Module:
        """Makes the network, initialised from torch's global generator.

        Raises:
            ConfigError: The images are of another size.
        """
        _of_cifars_size("cifar-resnet18", example_shape)
        models = import_torchvision().models
        network = models.resnet18(weights=None, num_classes=classes, zero_init_residual=self.zero_init_residual)
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
        return network


_POOLS: dict[str, Sequence[tuple[int, int]]] = {
    "square": ((2, 2),) * 5,
    "alternating": ((1, 2), (2, 1), (1, 2), (2, 1), (1, 2)),
}


class CifarVgg16Bn(Section):
    """Settings of the papers' modified VGG16 with batch normalisation, for images of 32 x 32.

    `pools = "square"` is the network of RS-KFAC (arXiv 2206.15397): five 2 x 2 pools, then 512-512-classes, 14,990,922
    parameters for ten classes. "alternating" is that of B-KFAC (arXiv 2210.08494): pools along one side at a time leave
    512 x 8 x 4 features, then 16384-2048-classes, whose factors are wide.
    """

    pools: Literal["square", "alternating"] = Field(
        default="square",
        description="square: five 2 x 2 pools, as in RS-KFAC's paper; alternating: pools along one side at a time, as "
        "in B-KFAC's, which leaves wide factors",
    )
    dropout: float = Field(default=0.5, ge=0, lt=1, description="share of the hidden units dropped in training")

    def build(self, example_shape: Sequence[int], classes: int) -> nn.Module:
        """Makes the network, initialised from torch's global generator.

        Raises:
            ConfigError: The images are of another size.
        """
        _of_cifars_size("cifar-vgg16bn", example_shape)
        # torchvision's own network would come with a classifier of 119 million parameters, of which none is used.
        vgg = import_torchvision().models.vgg
        layers: Any = vgg.make_layers(vgg.cfgs["D"], batch_norm=True)
        for layer in layers:
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:  # as it initialises them
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        pools = iter(_POOLS[self.pools])
        features = [nn.MaxPool2d(next(pools)) if isinstance(each, nn.MaxPool2d) else each for each in layers]
        width, hidden = (512, 512) if self.pools == "square" else (512 * 8 * 4, 2048)
        return nn.Sequential(
            *features,
            nn.Flatten(),
            nn.Linear(width, hidden),
            nn.ReLU(),
            nn.Dropout(self.dropout),
            nn.Linear(hidden, classes),
        )


def _of_cifars_size(name: str, example_shape: Sequence[int]) -> None:
    if list(example_shape) != [3, 32, 32]:
        raise ConfigError(
            f"is {name!r}; it takes [3, 32, 32], but the data has {list(example_shape)}; choose another model, such as "
            "torchvision",
            path="model.name",
        )
