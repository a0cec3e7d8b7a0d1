"""Images in shards, the tar files that webdataset writes, read in any order by their offsets.

An example is a run of members with one key, such as `000123.jpg` and `000123.cls`. In streams of shards a run that is
resumed would see other shuffles, and ranks unequal numbers of batches. Here every example is found once, by shard and
offset: shards are a map-style data set like any other, with the same guarantees.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from torch import Tensor

from kfdist.data.images import Cut, ImageCuts, read_picture
from kfdist.data.task import DataSet
from kfdist.errors import ConfigError
from kfdist.system.files import from_home

_IMAGES = frozenset({"jpg", "jpeg", "png", "ppm", "webp"})
_LABEL = "cls"
_MOST_CLASSES = 10**8
"""A file that says more is no class: a model has an output for each."""

_OPEN = 128
"""How many shards a process keeps open, in the order of their last use. An operating system may allow it 1024 files, or
256, and a data set may have more shards than that."""


@dataclass(frozen=True)
class ShardedPictures:
    """Images in tar files, with labels.

    Attributes:
        shards: The files.
        places: int64 [N, 3]: the shard, the image's offset in it, and its bytes.
        labels: int64 [N].
        cut: What becomes of them.
    """

    shards: tuple[str, ...]
    places: np.ndarray[Any, Any]
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
        shard, offset, size = (int(number) for number in self.places[index])
        path = self.shards[shard]
        name = f"{path}, {size} bytes at {offset}"
        picture = read_picture(lambda: io.BytesIO(_opened(path).read(size, offset)), self.cut, name=name)
        return picture, int(self.labels[index])


@dataclass(frozen=True)
class _OpenShard:
    """A shard's file descriptor, closed when nobody, in any thread, holds this any more."""

    descriptor: int

    def read(self, size: int, offset: int) -> bytes:
        """Reads by offset, which shares no position with anybody."""
        return os.pread(self.descriptor, size, offset)

    def __del__(self) -> None:
        os.close(self.descriptor)


@lru_cache(maxsize=_OPEN)
def _opened(shard: str) -> _OpenShard:
    return _OpenShard(os.open(shard, os.O_RDONLY | os.O_CLOEXEC))


def list_shards(folder: Path, pattern: str, cut: Cut, *, path: str) -> ShardedPictures:
    """Finds the images of all shards, in the order of the shards' names and within them.

    Args:
        folder: Where the shards are.
        pattern: Glob on their names.
        cut: What becomes of the images.
        path: The field that names them, for messages.

    Raises:
        ConfigError: The pattern is no glob below the folder, there are no shards, or one can't be used.
    """
    try:
        shards = sorted(folder.glob(pattern))
    except (NotImplementedError, ValueError, IndexError):  # absolute, or of no name
        raise ConfigError(f"is {pattern!r}; give a glob relative to {folder}, such as '*.tar'", path=path) from None
    if not shards:
        raise ConfigError(f"is {pattern!r}, and {folder} has no such file; give a glob on the shards' names", path=path)
    places, labels = [], []
    for number, shard in enumerate(shards):
        try:
            for offset, size, label in _examples(shard):
                places.append((number, offset, size))
                labels.append(label)
        except (OSError, tarfile.TarError, ValueError) as error:
            raise ConfigError(
                f"{shard} can't be used: {error}; a shard is a tar file, not compressed, whose examples are members of "
                f"one key: an image (.jpg, .png, ...) and its class from 0 (.{_LABEL})",
                path=path,
            ) from None
    table = np.array(places, dtype=np.int64).reshape(-1, 3)
    return ShardedPictures(tuple(map(str, shards)), table, np.array(labels, dtype=np.int64), cut)


def _examples(shard: Path) -> Iterator[tuple[int, int, int]]:
    """Yields offset, bytes and label of each image.

    Raises:
        ValueError: It is no regular file, an example lacks its image or its label, or the label is no number from 0.
        TarError: The file is no tar file, compressed, or torn.
    """
    if not shard.is_file():  # to open a FIFO might wait for ever
        raise ValueError("it is no regular file")
    if shard.stat().st_size % tarfile.BLOCKSIZE:
        raise ValueError("its size is no multiple of a tar's blocks: it is torn, or compressed")
    key, parts = "", dict[str, tarfile.TarInfo]()
    with tarfile.open(shard, "r:") as tar:

        def whole() -> tuple[int, int, int]:
            images = [part for extension, part in parts.items() if extension in _IMAGES]
            if len(images) != 1 or _LABEL not in parts:
                raise ValueError(f"example {key!r} has {', '.join(f'.{each}' for each in parts)}")
            file = tar.extractfile(parts[_LABEL])
            text = b"" if file is None else file.read(32)
            label = int(text) if text.strip().isdigit() else _MOST_CLASSES
            if label >= _MOST_CLASSES:
                raise ValueError(f"the class of example {key!r} is {text.decode(errors='replace')!r}")
            return images[0].offset_data, images[0].size, label

        for member in tar:
            if not member.isfile():
                continue
            extension = member.name.rpartition("/")[2].partition(".")[2]
            stem = member.name.removesuffix(f".{extension}")
            if parts and stem != key:
                yield whole()
                parts = {}
            key, parts[extension.lower()] = stem, member
            tar.members = []  # type: ignore[assignment]  # a million of them would fill the memory
        if parts:
            yield whole()


class ImageShards(ImageCuts):
    """Settings of images in shards: ROOT/train-*.tar and ROOT/val-*.tar, as webdataset's ImageNet is usually kept."""

    root: str = Field(min_length=1, description="the folder of the shards")
    train: str = Field(default="train-*.tar", min_length=1, description="glob on the names of the shards to train on")
    test: str = Field(default="val-*.tar", min_length=1, description="glob on the names of the shards to evaluate on")

    def load(self) -> DataSet[ShardedPictures]:
        """Finds the images.

        Raises:
            ConfigError: There are no shards, one can't be used, a class is evaluated and not trained, or only one is.
        """
        root = from_home(self.root).absolute()
        train, test = (
            list_shards(root, getattr(self, part), cut, path=f"data.settings.{part}")
            for part, cut in zip(("train", "test"), self.cuts(), strict=True)
        )
        classes = int(train.labels.max(initial=-1)) + 1
        if len(train) and train.labels.min() == train.labels.max():
            raise ConfigError(
                f"{root / self.train} has images of class {train.labels[0]} alone, and there is nothing to tell apart",
                path="data.settings.train",
            )
        if test.labels.max(initial=-1) >= classes:
            raise ConfigError(
                f"{root / self.test} has class {test.labels.max()}, and those to train on end at {classes - 1}",
                path="data.settings.test",
            )
        return self.task(train, test, classes)
