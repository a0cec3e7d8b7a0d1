"""torchvision beside the torch that is installed here."""

import importlib.util

import pytest
import torch

from kfdist.errors import ConfigError
from kfdist.vision import import_torchvision


def test_its_models_and_transforms_work_and_a_second_import_changes_nothing() -> None:
    torchvision = import_torchvision()
    assert import_torchvision() is torchvision
    from torchvision.models import mobilenet_v3_small
    from torchvision.transforms import v2

    image = v2.RandomResizedCrop(32)(torch.zeros(1, 3, 40, 48))
    assert mobilenet_v3_small(num_classes=3).eval()(image).shape == (1, 3)


def test_without_it_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'kfdist\[vision\]'"):
        import_torchvision()
