"""The model of a configuration on the meta device, and what an example looks like: without weights and without data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfdist.config import Config
from kfdist.config.named_functions import is_own
from kfdist.data.objective import Classification, Objective
from kfdist.data.reading import SeededReader
from kfdist.data.sets import load_data
from kfdist.data.task import Examples
from kfdist.errors import ConfigError
from kfdist.models import build_model
from kfdist.system.files import from_home

META = torch.device("meta")

_IMAGENETS_CLASSES = 1000

_SEEN = 8
"""How many examples are looked at, where one doesn't say enough."""


@dataclass(frozen=True, kw_only=True)
class ExampleOutline:
    """What an example looks like.

    Attributes:
        shape: Of its input, as the model gets it.
        dtype: Of its input.
        classes: Outputs of the model.
        target_shape: Of its target; a class number has none.
        target_dtype: Of its target.
        objective: What is minimised; None if it isn't known.
        remark: How this is known, where that isn't plain.
        seen: Inputs and targets of some examples, where the data were looked at.
    """

    shape: tuple[int, ...]
    classes: int
    dtype: torch.dtype = torch.float32
    target_shape: tuple[int, ...] = ()
    target_dtype: torch.dtype = torch.int64
    objective: Objective | None = Classification()
    remark: str = ""
    seen: tuple[Tensor, Tensor] | None = None

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Returns inputs and targets of so many examples, on the meta device."""
        inputs = torch.empty(size, *self.shape, dtype=self.dtype, device=META)
        return inputs, torch.empty(size, *self.target_shape, dtype=self.target_dtype, device=META)

    def batch_of_values(self, size: int) -> tuple[Tensor, Tensor]:
        """Returns as many with values: those that were seen, over and over, else noise; whole numbers are zeros."""
        if self.seen is not None:
            chosen = torch.arange(size, device="cpu") % len(self.seen[0])
            return self.seen[0][chosen], self.seen[1][chosen]
        inputs = _values((size, *self.shape), self.dtype, below=1)
        return inputs, _values((size, *self.target_shape), self.target_dtype, below=self.classes)


def _values(shape: tuple[int, ...], dtype: torch.dtype, *, below: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=dtype, device="cpu")
    return torch.randint(below, shape, generator=generator, dtype=dtype, device="cpu")


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A configuration's model without values.

    Attributes:
        model: On the meta device.
        example: What it is trained on.
        remarks: What of it is assumed, and why.
    """

    model: nn.Module
    example: ExampleOutline
    remarks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the user says of the data, instead of having it looked at.

    Attributes:
        shape: Of one input; None: as the configuration says.
        dtype: Of one input; None: as the configuration says, or float32.
        classes: Outputs of the model; None: as the configuration says.
    """

    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    classes: int | None = None


def make_outline(config: Config, given: Given) -> Outline:
    """Makes a configuration's model on the meta device.

    Raises:
        ConfigError: The model or the data are unknown, or a setting is wrong.
    """
    example = _example_of(config, given)
    remarks = [example.remark] if example.remark else []

    def build() -> nn.Module:
        return build_model(
            config.model.name,
            config.model.settings,
            example_shape=example.shape,
            classes=example.classes,
            seed=config.run.seed,
        )

    try:
        with META:
            model = build()
    except ConfigError:
        raise
    except Exception as error:  # of the user's own code, or an operation without a kernel for meta tensors
        model = build()
        remarks.append(
            f"the model can't be made on the meta device ({in_a_line(error)}); its weights were made in memory, and "
            "dropped"
        )
    return Outline(model=model.to(META), example=example, remarks=tuple(remarks))


def in_a_line(error: Exception) -> str:
    """Returns the kind of an error that isn't ours and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:200]}"


def _example_of(config: Config, given: Given) -> ExampleOutline:
    """Describes an example, by the settings where these say it, else by the user's own function."""
    name, settings = config.data.name, config.data.settings
    if is_own(name):
        if given.shape is not None and given.classes is not None:
            remark = "the loss of the data's own objective isn't known without the data: a square stands for it"
            dtype = given.dtype or torch.float32
            return ExampleOutline(shape=given.shape, classes=given.classes, dtype=dtype, objective=None, remark=remark)
        return _looked_at(config)
    describe = _DESCRIBED.get(name)
    if describe is None:
        return _looked_at(config)
    found = describe(settings)
    changes: dict[str, Any] = {"shape": given.shape, "classes": given.classes, "dtype": given.dtype}
    kept = {field: value for field, value in changes.items() if value is not None}
    assumed = found.remark if "classes" not in kept else ""
    return ExampleOutline(**{**vars(found), **kept, "remark": assumed})


def _looked_at(config: Config) -> ExampleOutline:
    """Has the data loaded and looks at some examples."""
    data = load_data(config.data.name, config.data.settings)
    if isinstance(data.train, Examples):
        inputs, targets = data.train.inputs[:_SEEN], data.train.labels[:_SEEN]
    else:
        batch = SeededReader(data=data.train, seed=0).__getitems__((0, list(range(min(_SEEN, len(data.train))))))
        inputs, targets = data.prepare(batch.inputs), batch.targets
    return ExampleOutline(
        shape=tuple(inputs.shape[1:]),
        classes=data.classes,
        dtype=inputs.dtype,
        target_shape=tuple(targets.shape[1:]),
        target_dtype=targets.dtype,
        objective=data.objective,
        remark=f"{config.data.name} was called, and {len(inputs)} examples read, to see what an example looks like",
        seen=(inputs, targets),
    )


def _digits(settings: Mapping[str, Any]) -> ExampleOutline:
    del settings
    return ExampleOutline(shape=(1, 8, 8), classes=10)


def _synthetic(settings: Mapping[str, Any]) -> ExampleOutline:
    return ExampleOutline(shape=tuple(settings.get("shape", (1, 8, 8))), classes=settings.get("classes", 10))


def _synthetic_images(settings: Mapping[str, Any]) -> ExampleOutline:
    size = settings.get("size", 224)
    return ExampleOutline(shape=(3, size, size), classes=settings.get("classes", 1000))


def _cifar(settings: Mapping[str, Any]) -> ExampleOutline:
    del settings
    return ExampleOutline(shape=(3, 32, 32), classes=10)


def _images(settings: Mapping[str, Any]) -> ExampleOutline:
    """Describes images in folders or shards: the classes are the folders, if those are here."""
    size = settings.get("train_size", 224)
    folder = from_home(str(settings.get("root", ""))) / str(settings.get("train_dir", "train"))
    classes, remark = _IMAGENETS_CLASSES, ""
    try:
        found = sum(entry.is_dir() for entry in folder.iterdir()) if settings.get("root") else 0
    except OSError:
        found = 0
    if found:
        classes = found
    else:
        remark = f"the images aren't here: {classes} classes are assumed, as ImageNet has (--classes N says otherwise)"
    return ExampleOutline(shape=(3, size, size), classes=classes, remark=remark)


_DESCRIBED: Mapping[str, Callable[[Mapping[str, Any]], ExampleOutline]] = {
    "digits": _digits,
    "synthetic": _synthetic,
    "synthetic-images": _synthetic_images,
    "cifar10": _cifar,
    "image-folder": _images,
    "image-shards": _images,
}
"""What the bundled data sets' settings say of an example."""
