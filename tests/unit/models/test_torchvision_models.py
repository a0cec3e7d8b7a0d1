"""Models that torchvision brings, and those of the papers that are made of them."""

from typing import NoReturn

import pytest
import torch
from torch import nn

from kfdist.errors import ConfigError
from kfdist.models import build_model, torchvision_models


def build(name: str, settings: dict[str, object], classes: int = 10, size: int = 32) -> nn.Module:
    return build_model(name, settings, example_shape=(3, size, size), classes=classes, seed=0)


def test_an_architecture_is_built_with_its_arguments():
    settings = {"architecture": "resnet18", "arguments": {"zero_init_residual": True}}
    network = build("torchvision", settings, classes=7)
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert not dict(network.named_parameters())["layer4.1.bn2.weight"].any()
    assert dict(network.named_parameters())["layer4.1.bn1.weight"].all()


@pytest.mark.parametrize(
    ("name", "settings", "parameters"),
    [
        # As counted in algorithms.md 3.6, from the released notebooks.
        ("cifar-vgg16bn", {}, 14_990_922),
        ("cifar-vgg16bn", {"pools": "alternating"}, 14_723_136 + 16384 * 2048 + 2048 + 2048 * 10 + 10),
        ("cifar-resnet18", {"zero_init_residual": True}, 11_173_962),
    ],
)
def test_the_networks_for_cifar_have_their_published_size(name: str, settings: dict[str, object], parameters: int):
    with torch.device("meta"):  # there is nothing to compute
        network = build(name, settings)
        assert network.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "settings", "path", "words"),
    [
        ("torchvision", {"architecture": "resnet5"}, "model.settings.architecture", "did you mean 'resnet50'"),
        (
            "torchvision",
            {"architecture": "resnet18", "arguments": {"zero_init": True}},
            "model.settings.arguments",
            "resnet18 refuses it: .*zero_init",
        ),
        ("resnet18", {}, "model.name", 'set model.name = "torchvision" and model.settings.architecture = "resnet18"'),
        ("cifar-resnet18", {}, "model.name", r"takes \[3, 32, 32\], but the data has \[3, 64, 64\]"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, settings: dict[str, object], path: str, words: str):
    with pytest.raises(ConfigError, match=words) as caught:
        build(name, settings, size=64)
    assert caught.value.path == path


@pytest.mark.parametrize(
    "fault",
    [
        ConfigError("isn't installed"),
        ImportError("No module named 'PIL'"),
        OSError("libc"),
        RuntimeError("no nms"),
    ],
)
def test_without_a_working_torchvision_an_unknown_model_is_refused_as_ever(
    monkeypatch: pytest.MonkeyPatch, fault: Exception
):
    def broken() -> NoReturn:
        raise fault

    monkeypatch.setattr(torchvision_models, "import_torchvision", broken)
    with pytest.raises(ConfigError, match="cifar-resnet18") as caught:
        build("cifar-resnet17", {})
    assert caught.value.path == "model.name"
