"""What `benchmarks.gpu` trains: three models of a usual size on data that is made here, and small ones for a CPU."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from kfdist.bench.workloads import Batch, SmallGpt, smooth_images, source_text
from kfdist.models import build_model
from kfdist.vision import import_torchvision


@dataclass(frozen=True, kw_only=True)
class Training:
    """A model, its data, and the settings of those who train it.

    Attributes:
        title: What it is, for people.
        model: Makes the model on the CPU, always the same.
        batch: Makes so many examples on the CPU, always the same.
        examples: How many a step has.
        sgd_lr: SGD's learning rate, with momentum .9.
        adamw_lr: AdamW's.
        skip: What `rs-kfac` leaves out.
        channels_last: Whether images and convolutions lie so.
    """

    title: str
    model: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    examples: int
    sgd_lr: float
    adamw_lr: float = 3e-4
    skip: tuple[str, ...] = ()
    channels_last: bool = False


class Task:
    """A training on a device, in bfloat16 with parameters in float32: one batch, over and over.

    Args:
        training: What is trained.
        device: Where.

    Attributes:
        training: As given.
        device: As given.
    """

    def __init__(self, training: Training, device: torch.device) -> None:
        self.training = training
        self.device = device

    @cached_property
    def _original(self) -> nn.Module:
        return self.training.model()

    @cached_property
    def batch(self) -> Batch:
        """The batch, on the device."""
        x, y = (each.to(self.device) for each in self.training.batch(self.training.examples))
        return (x.contiguous(memory_format=torch.channels_last) if self.training.channels_last else x), y

    def make(self) -> nn.Module:
        """Makes the model, always the same."""
        model = copy.deepcopy(self._original).to(self.device)
        if self.training.channels_last:
            model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return model

    def backward(self, model: nn.Module, examples: int | None = None) -> Tensor:
        """Does a forward and a backward of the batch, or of its first examples; returns the loss, a scalar."""
        inputs, targets = (each[:examples] for each in self.batch)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
        loss.backward()
        return loss.detach()

    def finish(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _resnet50() -> nn.Module:
    """Makes a ResNet-50 whose branches don't begin at zero, as the recipe's do.

    What was measured at the first step would be zero then, and of zero factors few eigenpairs are kept: until the next
    inverses, a hundred steps later, the application would cost less than it does in a run.
    """
    settings = {"architecture": "resnet50"}
    return build_model("torchvision", settings, example_shape=(3, 224, 224), classes=1000, seed=0)


def _vit(**sizes: int) -> nn.Module:
    """Makes a vision transformer of torchvision; its head doesn't begin at zero, for the reason of `_resnet50`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = import_torchvision().models.VisionTransformer(**sizes)
        nn.init.normal_(model.heads.head.weight, std=0.02)
    return model


def _gpt(**sizes: int) -> nn.Module:
    """Makes a GPT-2: the head's weight is the table's, and all begin with a standard deviation of 0.02."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SmallGpt(**sizes)
        model.head.weight = model.characters.weight
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
    return model


def _small_cnn() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(32, 10))


def _images(side: int) -> Callable[[int], Batch]:
    """Images with the spectrum of photographs: how fast eigenvalues fall decides how many are kept."""
    return lambda count: smooth_images((3, side, side), count, torch.Generator().manual_seed(0))


def _texts(context: int) -> Callable[[int], Batch]:
    """The standard library's source, a byte a token: what the tokens are makes no difference to what a step costs."""

    def texts(count: int) -> Batch:
        text = source_text("[a-c]*.py")
        starts = torch.arange(count).unsqueeze(1) * ((len(text) - context - 1) // count)
        rows = text[starts + torch.arange(context + 1)]
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    return texts


LARGE: Mapping[str, Training] = {
    "resnet50": Training(
        title="ResNet-50, images of 224 x 224, batch 256",
        model=_resnet50,
        batch=_images(224),
        examples=256,
        sgd_lr=0.1,
        channels_last=True,
    ),
    "gpt": Training(
        title="GPT-2 of 124 million parameters (12 layers, width 768, context 1024, 50,304 tokens), batch 32",
        model=lambda: _gpt(layers=12, width=768, heads=12, context=1024, characters=50_304),
        batch=_texts(1024),
        examples=32,
        sgd_lr=0.01,
        skip=("characters", "head"),  # a factor of 50,304 x 50,304 has 10 GB
    ),
    "vit": Training(
        title="ViT-B/16, images of 224 x 224, batch 256",
        model=lambda: _vit(
            image_size=224,
            patch_size=16,
            num_classes=1000,
            num_layers=12,
            num_heads=12,
            hidden_dim=768,
            mlp_dim=3072,
        ),
        batch=_images(224),
        examples=256,
        sgd_lr=0.01,
        channels_last=True,
    ),
}
"""By the name that the command gives them."""

TINY: Mapping[str, Training] = {
    "resnet50": Training(
        title="a small CNN",
        model=_small_cnn,
        batch=_images(16),
        examples=8,
        sgd_lr=0.1,
        channels_last=True,
    ),
    "gpt": Training(
        title="a small GPT",
        model=lambda: _gpt(layers=1, width=16, heads=2, context=8, characters=256),
        batch=_texts(8),
        examples=4,
        sgd_lr=0.01,
        skip=("characters", "head"),
    ),
    "vit": Training(
        title="a small vision transformer",
        # In the last layer only the class token has gradients: of one layer alone that would be most of them.
        model=lambda: _vit(
            image_size=16,
            patch_size=8,
            num_classes=10,
            num_layers=2,
            num_heads=2,
            hidden_dim=16,
            mlp_dim=32,
        ),
        batch=_images(16),
        examples=4,
        sgd_lr=0.01,
        channels_last=True,
    ),
}
"""The same code in seconds on a CPU, which says nothing of how fast anything is."""
