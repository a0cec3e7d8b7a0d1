"""Tasks with a target, for `kfdist bench target`; a new one is an entry of `TASKS`."""

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kfdist.bench.workloads import Batch, SmallGpt, mean_cross_entropy, source_text
from kfdist.data.sets import Digits
from kfdist.errors import ConfigError
from kfdist.models.small import DigitsCnn

FIRST_DATA = "1"
"""A task's first data, also of cells that don't say."""

_MEASURED_AT_ONCE = 1000
_CONTEXT = 64
_HELD_OUT = 20
_MNIST = "the four IDX files of MNIST, such as train-images-idx3-ubyte.gz"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be reached.

    Attributes:
        title: What it is, for people.
        metric: What is measured; lower is better.
        goal: The value that counts as reached; None: what the best of the others has after all the seconds.
        seconds: Of training, at most.
        batch_size: Examples a step.
        data: Training and test examples, given the folder of `--data`.
        data_version: A word for them, another one whenever they change: what was measured on others counts no more.
        build: Makes the model, from torch's global generator.
        loss: Of a model's outputs and targets.
        loss_name: The same, for methods that are told the loss.
        measure: The metric's mean over outputs and targets; the loss if None.
        on_test: Whether the metric is that of the test examples; else of training examples.
        most_measured: How many examples are measured, the first ones; all if 0.
        inputs_are_targets: Whether the model is to return what it was given.
        evaluation_period: Steps between two measurements.
        needs_folder: Whether the data must be given.
        folder: The folder that was given.
        average_decay: Of the exponential average of parameters and buffers over steps that is measured in the model's
            place; 0: none.
    """

    title: str
    metric: str
    goal: float | None
    seconds: float
    batch_size: int
    data: Callable[[Path | None], tuple[Batch, Batch]]
    build: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    loss_name: str
    measure: Callable[[Tensor, Tensor], Tensor] | None = None
    data_version: str = FIRST_DATA
    on_test: bool = False
    most_measured: int = 0
    inputs_are_targets: bool = False
    evaluation_period: int = 10
    needs_folder: bool = False
    folder: Path | None = None
    average_decay: float = 0.0

    def model(self, seed: int) -> nn.Module:
        """Makes the model; equal seeds give equal parameters."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build()

    def average(self, model: nn.Module) -> AveragedModel | None:
        """Makes the average that is measured, to be updated after each step; None where the model itself is."""
        if not self.average_decay:
            return None
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.average_decay), use_buffers=True)

    def batches(self, seed: int) -> Iterator[Batch]:
        """Yields batches for ever, each example once an epoch."""
        inputs, targets = self.examples(test=False)
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(inputs), generator=generator)
            for chosen in order.split(self.batch_size):
                if len(chosen) == min(self.batch_size, len(inputs)):
                    yield inputs[chosen], targets[chosen]

    def examples(self, *, test: bool) -> Batch:
        """Returns all inputs with their targets."""
        inputs, targets = self.data(self.folder)[test]
        return (inputs, inputs) if self.inputs_are_targets else (inputs, targets)

    def value(self, model: nn.Module) -> float:
        """Measures the metric."""
        inputs, targets = self.examples(test=self.on_test)
        count = min(self.most_measured or len(inputs), len(inputs))
        measure, total = self.measure or self.loss, 0.0
        model.eval()
        with torch.no_grad():
            for chosen in torch.arange(count).split(_MEASURED_AT_ONCE):
                total += len(chosen) * float(measure(model(inputs[chosen]), targets[chosen]))
        model.train()
        return total / count


@cache
def _digits(folder: Path | None) -> tuple[Batch, Batch]:
    del folder
    data = Digits().load()
    return (data.train.inputs, data.train.labels), (data.test.inputs, data.test.labels)


@cache
def _flat_digits(folder: Path | None) -> tuple[Batch, Batch]:
    train, test = _digits(folder)
    return (train[0].flatten(1), train[1]), (test[0].flatten(1), test[1])


@cache
def _mnist(folder: Path | None) -> tuple[Batch, Batch]:
    """Reads MNIST's four IDX files, gzipped or not: pixels from 0 to 1, [N, 1, 28, 28], and labels [N]."""
    if folder is None:
        raise ConfigError(f"isn't given, and this task's data are {_MNIST}; name their folder", path="--data")
    parts = []
    for part in ("train", "t10k"):
        pixels = _bytes_of(folder, f"{part}-images-idx3-ubyte", header=16, each=784).reshape(-1, 1, 28, 28)
        labels = _bytes_of(folder, f"{part}-labels-idx1-ubyte", header=8, each=1)
        if len(pixels) != len(labels):
            raise ConfigError(
                f"{str(folder)!r} has {len(pixels)} images and {len(labels)} labels of {part}; get the files anew",
                path="--data",
            )
        parts.append((pixels.float() / 255, labels.long()))
    return parts[0], parts[1]


def _bytes_of(folder: Path, name: str, *, header: int, each: int) -> Tensor:
    """Returns the bytes of an IDX file behind its header."""
    plain, packed = folder / name, folder / f"{name}.gz"
    try:
        content = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(
            f"{str(packed)!r} can't be read ({error}); the folder must have {_MNIST}", path="--data"
        ) from None
    if len(content) <= header or (len(content) - header) % each:
        raise ConfigError(
            f"{name} in {str(folder)!r} has {len(content)} bytes, not {header} and {each} an example; get it anew",
            path="--data",
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header)


@cache
def _flat_mnist(folder: Path | None) -> tuple[Batch, Batch]:
    train, test = _mnist(folder)
    return (train[0].flatten(1), train[1]), (test[0].flatten(1), test[1])


@cache
def _windows(folder: Path | None) -> tuple[Batch, Batch]:
    """Cuts the source into texts; every twentieth is held out, of which some from all over the source are measured.

    There are .6 MB of it: AdamW reaches a validation loss of 1.40 in 600 steps. With .2 MB, which it reads five times
    meanwhile, that is 1.22, and with all 5 it is 1.6.
    """
    del folder
    text = source_text("[a-c]*.py")
    texts = text[: len(text) // (_CONTEXT + 1) * (_CONTEXT + 1)].view(-1, _CONTEXT + 1)
    held_out = torch.arange(len(texts)) % _HELD_OUT == 0
    train, test = texts[~held_out], texts[held_out]
    test = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))]
    return (train[:, :-1], train[:, 1:]), (test[:, :-1], test[:, 1:])


def autoencoder(widths: Iterable[int]) -> nn.Sequential:
    """Makes an autoencoder of linear layers with tanh between them.

    Args:
        widths: From the input to the code; the way back is the same.
    """
    down = list(widths)
    sizes = [*down, *down[-2::-1]]
    layers = [module for p, q in zip(sizes, sizes[1:], strict=False) for module in (nn.Linear(p, q), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class _Residual(nn.Module):
    """Two convolutions with norms beside what they are added to, which a stride makes smaller."""

    def __init__(self, depth: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(depth, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.beside = nn.Identity() if stride == 1 else nn.Conv2d(depth, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.beside(x))


def small_resnet() -> nn.Sequential:
    """Makes a ResNet of three blocks, 16, 32 and 64 wide, for images of 28 x 28 with one channel: 78,000 parameters."""
    stem = [nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [_Residual(16, 16, 1), _Residual(16, 32, 2), _Residual(32, 64, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def _errors(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(-1) != targets).float().mean()


_CNN = Task(
    title="digits CNN, batch 128",
    metric="test loss",
    goal=0.03,
    seconds=12.0,
    batch_size=128,
    data=_digits,
    build=lambda: DigitsCnn().build((1, 8, 8), 10),
    loss=F.cross_entropy,
    loss_name="cross_entropy",
    on_test=True,
    evaluation_period=5,
)

TASKS: Mapping[str, Task] = {
    "digits-autoencoder": Task(
        title="digits autoencoder 64-256-128-32-8 and back, tanh, batch 256",
        metric="training MSE",
        goal=0.0022,
        seconds=20.0,
        batch_size=256,
        data=_flat_digits,
        build=lambda: autoencoder((64, 256, 128, 32, 8)),
        loss=F.mse_loss,
        loss_name="mse",
        inputs_are_targets=True,
    ),
    "digits-cnn": _CNN,
    "digits-cnn-1024": replace(_CNN, title="digits CNN, batch 1,024", batch_size=1024, seconds=30.0),
    "character-gpt": Task(
        title="character GPT of 3 layers, width 96, context 64, batch 32, on the standard library's source",
        metric="validation loss",
        goal=1.3,
        seconds=90.0,
        batch_size=32,
        data=_windows,
        data_version="3",  # .6 MB of text, held out all over it
        build=lambda: SmallGpt(layers=3, width=96, context=_CONTEXT),
        loss=mean_cross_entropy,
        loss_name="cross_entropy",
        on_test=True,
        most_measured=256,
        evaluation_period=25,
    ),
    "mnist-autoencoder": Task(
        title="MNIST autoencoder 784-1000-500-250-30 and back, tanh, batch 500",
        metric="training MSE",
        goal=None,
        seconds=120.0,
        batch_size=500,
        data=_flat_mnist,
        build=lambda: autoencoder((784, 1000, 500, 250, 30)),
        loss=F.mse_loss,
        loss_name="mse",
        inputs_are_targets=True,
        most_measured=5000,
        evaluation_period=20,
        needs_folder=True,
    ),
    "mnist-resnet": Task(
        title="ResNet of 3 blocks, 16 to 64 wide, on MNIST, batch 128, averaged weights",
        metric="test error",
        goal=0.007,
        seconds=120.0,
        batch_size=128,
        data=_mnist,
        build=small_resnet,
        loss=F.cross_entropy,
        loss_name="cross_entropy",
        measure=_errors,
        on_test=True,
        evaluation_period=100,
        needs_folder=True,
        average_decay=0.99,  # at a constant rate a last iterate's error goes up and down by a half
    ),
}
"""By the name that `--task` gives them."""
