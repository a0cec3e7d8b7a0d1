"""The configurations that come with kfdist: each is valid, fits its model and its data, and is found by its name."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kfdist.config import load_config
from kfdist.config.recipes import described, recipes
from kfdist.errors import ConfigError
from kfdist.training.method import damping_of
from kfdist.training.optimizers import LearningRate
from kfdist.training.setup import gather_materials
from tests.support.pictures import write_cifar10, write_folders


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is one of images, and of CIFAR-10's files in another part."""
    folder = write_folders(tmp_path_factory.mktemp("data"), classes=6, train=8, test=1)
    write_cifar10(folder / "cifar", each=60)
    return folder


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_fits_its_model_and_its_data(name: str, root: Path):
    with pytest.raises(ConfigError, match=r"^data\.settings\.root: is missing .*; give it a value"):
        gather_materials(load_config(Path(name), environment={}), 2, torch.device("cpu"))
    here = root / "cifar" if name.startswith("cifar") else root
    small = (f"data.settings.root={here}", "data.batch_size=2", "data.micro_batches=1")
    config = load_config(Path(name), overrides=small, environment={})
    materials = gather_materials(config, 2, torch.device("cpu"))
    assert config.run.name == name
    assert materials.data.classes == (10 if name.startswith("cifar") else 6)
    measured = {module for block in materials.plan.blocks for module in [block.name]}
    assert len(measured) >= 15 or not config.preconditioner.inverts
    assert 20 < len(described(recipes()[name])) < 120


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        # For 256 examples a step; SENG: 0.145 (1 - (epoch - 5) / 60)^6.
        ("imagenet-resnet50-kaisa", {0: 0.1 / 500, 5: 0.1, 24.99: 0.1, 25: 0.01, 35: 1e-3, 50: 1e-6}),
        ("imagenet-resnet50-seng", {5: 0.145, 25: 0.145 * (2 / 3) ** 6, 49: 0.145 * (16 / 60) ** 6}),
        ("imagenet-resnet50-sgd", {5: 0.1, 29.99: 0.1, 30: 0.01, 60: 1e-3, 80: 1e-4}),
        ("imagenet-resnet50-spngd", {0: 0.00818, 26.5: 0.00818 * 0.5**11}),
        ("cifar10-resnet18", {0: 0.05, 35: 0.05 * 0.5**6}),
        ("cifar10-vgg16bn", {0: 0.1, 11.99: 0.1, 12: 0.0316, 26: 0.1 * 0.316**3}),
    ],
)
def test_learning_rates_are_the_published_ones(name: str, rates: dict[float, float]):
    config = load_config(Path(name), environment={})
    steps = 100
    total = (config.run.epochs or 0) * steps
    rate = LearningRate(section=config.optimizer, total_steps=total, steps_per_epoch=steps, step_examples=256)
    assert {epoch: rate(round(epoch * steps)) for epoch in rates} == pytest.approx(rates, rel=1e-9)
    doubled = LearningRate(section=config.optimizer, total_steps=total, steps_per_epoch=steps, step_examples=512)
    assert doubled.peak == (2 if config.optimizer.lr_batch_size else 1) * rate.peak


@pytest.mark.parametrize(
    ("name", "values"),
    [
        # SENG: 0.17 * 0.9^(epoch / 10); RS-KFAC's fraction of the largest eigenvalue.
        ("imagenet-resnet50-seng", {0: 0.17, 10: 0.17 * 0.9, 45.5: 0.17 * 0.9**4.55}),
        ("cifar10-vgg16bn", {0: 0.1, 24.99: 0.1, 25: 0.05, 34.99: 0.05, 35: 0.01, 50: 0.01}),
        ("imagenet-resnet50-kaisa", {0: 1e-3, 54: 1e-3}),
    ],
)
def test_dampings_are_the_published_ones(name: str, values: dict[float, float]):
    section = load_config(Path(name), environment={}).preconditioner
    damping = damping_of(section, steps_per_epoch=100)
    assert {epoch: damping(round(epoch * 100)) for epoch in values} == pytest.approx(values, rel=1e-4)


def test_names_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no such file or recipe; did you mean 'imagenet-resnet50'.*`kfdist recipes`"):
        load_config(Path("imagenet-resnet-50"), environment={})
    (tmp_path / "cifar10-vgg16bn").mkdir()
    assert load_config(Path("cifar10-vgg16bn"), environment={}).run.name == "cifar10-vgg16bn"
    (tmp_path / "cifar10-resnet18").write_text('[run]\nname = "mine"\nsteps = 1\n')
    assert load_config(Path("cifar10-resnet18"), environment={}).run.name == "mine"


def test_the_command_lists_them_and_shows_one():
    def kfdist(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "kfdist", "recipes", *arguments], capture_output=True, text=True)

    lines = kfdist().stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(recipes())
    assert all(len(line.split()) > 5 for line in lines)
    assert kfdist("cifar10-vgg16bn").stdout == recipes()["cifar10-vgg16bn"].read_text()
    refused = kfdist("cifar10")
    assert refused.returncode == 2 and "did you mean 'cifar10-" in refused.stderr
