"""What is trained while a step is timed: small models, on data that costs nothing to fetch."""

import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfdist.models import build_model

Batch = tuple[Tensor, Tensor]

_CLASSES = 10
_POOL = 2048
"""Examples that batches are drawn from."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model and its batches.

    Attributes:
        title: What it is, for people.
        batch_size: Examples a step.
        lr: Learning rate of SGD with momentum 0.9.
        model: Makes the model from a seed; the same seed gives the same parameters.
        batches: Makes a source of batches from a generator.
    """

    title: str
    batch_size: int
    lr: float
    model: Callable[[int], nn.Module]
    batches: Callable[[torch.Generator], Callable[[], Batch]]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the loss of a batch."""
        inputs, targets = batch
        return mean_cross_entropy(model(inputs), targets)


def mean_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean cross entropy of logits [..., classes], over positions too where there are any."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def smooth_images(shape: Sequence[int], count: int, generator: torch.Generator) -> Batch:
    """Draws images whose power falls with frequency, as that of photographs does: noise has a flat spectrum.

    Each class has an image of its own beneath them, so that a model's loss falls.

    Args:
        shape: Channels, height and width.
        count: How many.
        generator: Where randomness comes from.

    Returns:
        Images, float32 [count, *shape] with mean 0 and variance 1, and labels [count].
    """
    depth, height, width = shape

    def fields(number: int) -> Tensor:
        found = torch.zeros(number, depth, height, width)
        for size in (2, 4, 8, 16, min(height, width)):
            noise = torch.randn(number, depth, size, size, generator=generator)
            found += F.interpolate(noise, (height, width), mode="bilinear", align_corners=False) / size**0.5
        return found

    labels = torch.randint(_CLASSES, (count,), generator=generator)
    images = fields(_CLASSES)[labels] + fields(count)
    return (images - images.mean()) / images.std(), labels


def source_text(files: str = "a*.py") -> Tensor:
    """Returns source of the standard library as bytes, int64 [N]: text that every machine has.

    Args:
        files: A pattern of the files: 0.2 MB with the default, .6 MB with "[a-c]*.py".
    """
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join(file.read_bytes() for file in sorted(folder.glob(files)))
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def _images(shape: Sequence[int], batch_size: int) -> Callable[[torch.Generator], Callable[[], Batch]]:
    def batches(generator: torch.Generator) -> Callable[[], Batch]:
        images, labels = smooth_images(shape, _POOL, generator)

        def draw() -> Batch:
            chosen = torch.randint(_POOL, (batch_size,), generator=generator)
            # One label in ten is wrong, anew in each batch: learnt by heart, gradients would vanish, and denormal
            # numbers take a processor several times longer.
            wrong = torch.rand(batch_size, generator=generator) < 0.1
            others = torch.randint(_CLASSES, (batch_size,), generator=generator)
            return images[chosen], torch.where(wrong, others, labels[chosen])

        return draw

    return batches


def _text(context: int, batch_size: int) -> Callable[[torch.Generator], Callable[[], Batch]]:
    def batches(generator: torch.Generator) -> Callable[[], Batch]:
        text = source_text()

        def draw() -> Batch:
            starts = torch.randint(len(text) - context, (batch_size, 1), generator=generator)
            places = starts + torch.arange(context)
            return text[places], text[places + 1]

        return draw

    return batches


class SmallGpt(nn.Module):
    """A character GPT: pre-norm blocks of causal attention and a GELU network of four times the width.

    Args:
        layers: Blocks.
        width: Of the residual stream; a multiple of `heads`.
        heads: Attention heads.
        context: Longest text.
        characters: Size of the alphabet.
    """

    def __init__(
        self, *, layers: int = 4, width: int = 128, heads: int = 4, context: int = 64, characters: int = 256
    ) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(_GptBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """Returns logits [N, T, characters] of texts, int64 [N, T]."""
        x = self.characters(text) + self.positions(torch.arange(text.shape[1], device=text.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class _GptBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm_1(x)).unflatten(-1, (3, self._heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads.unbind(), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


def _of_package(name: str, shape: Sequence[int], **settings: object) -> Callable[[int], nn.Module]:
    return lambda seed: build_model(name, settings, example_shape=shape, classes=_CLASSES, seed=seed)


def _gpt(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallGpt()


WORKLOADS: Mapping[str, Workload] = {
    "resnet18": Workload(
        title="ResNet-18 with the ImageNet stem, images of 32 x 32, batch 64",
        batch_size=64,
        lr=0.05,
        model=_of_package("torchvision", (3, 32, 32), architecture="resnet18"),
        batches=_images((3, 32, 32), 64),
    ),
    "mlp": Workload(
        title="MLP 784-1024-1024-10, batch 256",
        batch_size=256,
        lr=0.05,
        model=_of_package("mlp", (1, 28, 28), hidden=(1024, 1024)),
        batches=_images((1, 28, 28), 256),
    ),
    "gpt": Workload(
        title="character GPT of 4 layers, width 128, context 64, batch 16",
        batch_size=16,
        lr=0.05,
        model=_gpt,
        batches=_text(64, 16),
    ),
}
"""By the name that `--model` gives them."""
