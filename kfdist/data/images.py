"""Data sets of images in folders, read one by one by loader processes; and what becomes of an image.

Images travel as bytes and become normalised numbers on their device. They need torchvision, whose objects are made
where they are used: a data set that is sent to a loader process holds paths and numbers only.
"""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self, TypeVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from kfdist.config.fields import Section
from kfdist.data.objective import Classification
from kfdist.data.reading import CorruptExample, Readable
from kfdist.data.task import DataSet
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.system.files import from_home, open_regular
from kfdist.vision import import_torchvision

R = TypeVar("R", bound=Readable)

_MOST_PIXELS = 1 << 27
"""Of a resized image; Pillow opens none of many more."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How an image becomes pixels: uint8 [3, size, size].

    Attributes:
        kind: "resized": a random part of random aspect, resized (torchvision's RandomResizedCrop), perhaps mirrored;
            "padded": padded by `margin` and cut at random, perhaps mirrored; "centre": the shorter side is resized to
            `margin`, and the middle is cut out; "whole": as it is. Those that are padded or whole must have `size`.
        size: Height and width of the result.
        margin: See `kind`.
    """

    kind: Literal["resized", "padded", "centre", "whole"]
    size: int
    margin: int = 0


@cache
def transform(cut: Cut) -> Any:
    """Makes the function of an image, or of its pixels, that cuts it; once per process."""
    import_torchvision()
    from torchvision.transforms import v2

    if cut.kind == "whole":
        steps = []
    elif cut.kind == "centre":
        steps = [v2.Resize(cut.margin), v2.CenterCrop(cut.size)]
    else:
        first = v2.RandomResizedCrop(cut.size) if cut.kind == "resized" else v2.RandomCrop(cut.size, cut.margin)
        steps = [first, v2.RandomHorizontalFlip()]
    return v2.Compose([*steps, v2.PILToTensor()])


@dataclass(frozen=True, kw_only=True)
class Normalise:
    """Makes numbers of a batch of pixels: (pixel / 255 - mean) / deviation, channel by channel.

    Attributes:
        mean: Of red, green and blue.
        deviation: Standard deviation of each.
    """

    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Takes uint8 [n, 3, h, w], returns float32."""
        mean, deviation = (
            torch.tensor(values, dtype=torch.float32, device="cpu")
            .mul_(255)
            .view(3, 1, 1)
            .to(pixels.device, non_blocking=True)  # else every batch would wait for the device
            for values in (self.mean, self.deviation)
        )
        return pixels.to(torch.float32).sub_(mean).div_(deviation)


IMAGENET = Normalise(mean=(0.485, 0.456, 0.406), deviation=(0.229, 0.224, 0.225))
"""Mean and deviation of the training images."""


@dataclass(frozen=True)
class Pictures:
    """Image files with labels.

    Attributes:
        folder: Where they are.
        names: Their paths below it, bytes [N]; an array, since a million strings would be slow to send.
        labels: int64 [N].
        cut: What becomes of them.
    """

    folder: str
    names: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    cut: Cut

    def __len__(self) -> int:
        """Returns how many there are."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Reads an image.

        Raises:
            CorruptExample: It can't be read.
        """
        path = self.path(index)
        return read_picture(lambda: open_regular(path), self.cut, name=path), int(self.labels[index])

    def path(self, index: int) -> str:
        """Returns an image's file."""
        return os.path.join(self.folder, os.fsdecode(bytes(self.names[index])))


def read_picture(opened: Callable[[], BinaryIO], cut: Cut, *, name: str) -> Tensor:
    """Decodes an image and cuts it; see `decoded`.

    Raises:
        CorruptExample: It can't be read, or has a size that can't be cut so.
        EnvironmentFault: No file can be opened any more.
    """
    image = decoded(opened, name=name)
    if cut.kind in ("padded", "whole") and image.size != (cut.size, cut.size):
        raise CorruptExample(name, f"{image.width} x {image.height} pixels, and {cut.size} x {cut.size} are needed")
    shorter, longer = sorted(image.size)
    if cut.kind == "centre" and cut.margin**2 * longer > _MOST_PIXELS * shorter:
        reason = f"{longer} pixels along {shorter}, and more than fit in memory once the shorter side is resized"
        raise CorruptExample(name, reason)
    try:
        return transform(cut)(image)
    except ValueError as error:  # of a size of which nothing can be cut out
        raise CorruptExample(name, str(error)) from None


def decoded(opened: Callable[[], BinaryIO], *, name: str) -> Any:
    """Decodes an image, as Pillow's.

    Args:
        opened: Opens what holds it.
        name: What users know it by.

    Raises:
        CorruptExample: It can't be read.
        EnvironmentFault: No file can be opened any more, which says nothing of this one.
    """
    from PIL import Image

    try:
        with opened() as file:
            return _in_colours(Image.open(file))
    except (OSError, SyntaxError, ValueError, NotImplementedError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise EnvironmentFault(f"{name} can't be opened: {error.strerror}; raise the limit (ulimit -n)") from None
        # Pillow has its own error for nearly each kind of damage, and ends with the file's name or object.
        raise CorruptExample(name, str(error).partition(" <")[0] or type(error).__name__) from None


def _in_colours(image: Any) -> Any:
    """Returns an image with 8 bits each of red, green and blue.

    Raises:
        ValueError: Nothing says what its largest number would be.
    """
    from PIL import Image

    if image.mode.startswith("I;16"):  # which Pillow would cut off at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers of no known range; convert it to 8 or 16 bits")
    return image.convert("RGB")


def list_pictures(folder: Path, cut: Cut, *, path: str) -> tuple[Pictures, list[str]]:
    """Lists a folder that has one folder per class, and returns the classes too, in their order.

    Args:
        folder: The folder.
        cut: What becomes of the images.
        path: The field that names it, for messages.

    Raises:
        ConfigError: It isn't there, or a class has no images.
    """
    import_torchvision()
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(folder))
    except OSError as error:
        raise ConfigError(
            f"{folder} can't be used: {str(error).splitlines()[0]}; it must have a folder of images for each class",
            path=path,
        ) from None
    names = np.array([os.fsencode(os.path.relpath(name, folder)) for name, _ in found.samples])
    labels = np.array([label for _, label in found.samples], dtype=np.int64)
    return Pictures(str(folder), names, labels, cut), list(found.classes)


def both_folders(train: Path, test: Path, cuts: tuple[Cut, Cut], *, path: str) -> tuple[Pictures, Pictures, int]:
    """Lists the folders of training and of evaluation, and counts the classes.

    Args:
        train: The first.
        test: The second.
        cuts: What becomes of the images of each.
        path: The field that names them, for messages.

    Raises:
        ConfigError: One isn't there, has other classes, or only one.
    """
    trained, classes = list_pictures(train, cuts[0], path=path)
    tested, others = list_pictures(test, cuts[1], path=path)
    if classes != others:
        different = sorted(set(classes) ^ set(others))[:5]
        raise ConfigError(
            f"{train} and {test} have different classes, such as {different}; give both the same", path=path
        )
    if len(classes) < 2:
        raise ConfigError(
            f"{train} has one class, {classes[0]!r}, and there is nothing to tell apart; it must have a folder of "
            "images for each of two classes or more",
            path=path,
        )
    return trained, tested, len(classes)


class ImageCuts(Section):
    """How the images of a data set of ImageNet's kind are cut, and how they count."""

    train_size: int = Field(default=224, ge=8, description="height and width of the random resized crops")
    test_size: int = Field(default=224, ge=8, description="height and width of the centre crops in evaluation")
    test_resize: int | None = Field(
        default=None, ge=8, description="what their shorter side is resized to before; test_size * 8 / 7 if not given"
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="share of the target spread over all classes")

    @model_validator(mode="after")
    def _crops_fit(self) -> Self:
        if self.test_resize is not None and self.test_resize < self.test_size:
            raise ConfigError(
                f"is {self.test_resize}, less than test_size = {self.test_size}; crops can't be larger",
                path="test_resize",
            )
        return self

    def cuts(self) -> tuple[Cut, Cut]:
        """Returns what becomes of an image in training, and in evaluation."""
        resize = self.test_resize or round(self.test_size * 8 / 7)
        return Cut(kind="resized", size=self.train_size), Cut(kind="centre", size=self.test_size, margin=resize)

    def task(self, train: R, test: R, classes: int) -> DataSet[R]:
        """Makes the task of both parts."""
        objective = Classification(label_smoothing=self.label_smoothing, top5=classes > 5)
        return DataSet(train=train, test=test, classes=classes, objective=objective, prepare=IMAGENET)


class ImageFolders(ImageCuts):
    """Settings of a folder of images, as ImageNet is usually kept: ROOT/train/CLASS/FILE and ROOT/val/CLASS/FILE."""

    root: str = Field(min_length=1, description="the folder")
    train_dir: str = Field(default="train", min_length=1, description="the folder in it to train on")
    test_dir: str = Field(default="val", min_length=1, description="the folder in it to evaluate on")

    def load(self) -> DataSet[Pictures]:
        """Lists the images.

        Raises:
            ConfigError: The folders aren't there, have different classes or one alone, or a class has no images.
        """
        root = from_home(self.root).absolute()
        train, test, classes = both_folders(
            root / self.train_dir, root / self.test_dir, self.cuts(), path="data.settings.root"
        )
        return self.task(train, test, classes)
