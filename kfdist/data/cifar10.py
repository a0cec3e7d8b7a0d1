"""CIFAR-10: its binary version, which has no pickle in it, or folders of images."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from kfdist.config.fields import Section
from kfdist.data.images import Cut, Normalise, Pictures, both_folders, decoded, transform
from kfdist.data.objective import Classification
from kfdist.data.reading import CorruptExample
from kfdist.data.task import DataSet
from kfdist.errors import ConfigError
from kfdist.system.files import from_home, open_regular

CIFAR = Normalise(mean=(0.4914, 0.4822, 0.4465), deviation=(0.2470, 0.2435, 0.2616))
"""Mean and deviation of the training images."""

_RECORD = 1 + 3 * 32 * 32


@cache
def _records(files: tuple[str, ...]) -> list[np.ndarray[Any, Any]]:
    return [np.memmap(file, dtype=np.uint8, mode="r").reshape(-1, _RECORD) for file in files]


@dataclass(frozen=True)
class CifarRecords:
    """CIFAR-10's binary version: a byte of label, then 32 x 32 bytes each of red, green and blue.

    Attributes:
        files: Paths.
        counts: Examples in each.
        cut: What becomes of the images.
    """

    files: tuple[str, ...]
    counts: tuple[int, ...]
    cut: Cut

    def __len__(self) -> int:
        """Returns how many there are."""
        return sum(self.counts)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Reads an image."""
        file = 0
        while index >= self.counts[file]:
            index -= self.counts[file]
            file += 1
        record = _records(self.files)[file][index]
        return transform(self.cut)(torch.from_numpy(record[1:].reshape(3, 32, 32).copy())), int(record[0])


class Cifar10(Section):
    """Settings of CIFAR-10, from its binary version (cifar-10-binary.tar.gz unpacked) or from train/ and test/."""

    root: str = Field(min_length=1, description="the folder with data_batch_1.bin and so on, or with train/ and test/")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="share of the target spread over all classes")

    def load(self) -> DataSet[Pictures | CifarRecords]:
        """Looks at the files; images are padded by 4 and cut at random to train, and left as they are to evaluate.

        Raises:
            ConfigError: They aren't there, aren't CIFAR-10's, or are of another size.
        """
        root = from_home(self.root).absolute()
        cuts = Cut(kind="padded", size=32, margin=4), Cut(kind="whole", size=32)
        if (root / "train").is_dir():
            train, test, classes = both_folders(root / "train", root / "test", cuts, path="data.settings.root")
            for part in (train, test):
                _refuse_other_sizes(part)
            return self._task(train, test, classes)
        folder = root / "cifar-10-batches-bin"
        folder = folder if folder.is_dir() else root
        return self._task(
            _binary([folder / f"data_batch_{number}.bin" for number in range(1, 6)], cuts[0]),
            _binary([folder / "test_batch.bin"], cuts[1]),
            10,
        )

    def _task(self, train: Pictures | CifarRecords, test: Pictures | CifarRecords, classes: int) -> DataSet[Any]:
        objective = Classification(label_smoothing=self.label_smoothing)
        return DataSet(train=train, test=test, classes=classes, objective=objective, prepare=CIFAR)


def _refuse_other_sizes(pictures: Pictures) -> None:
    """Refuses images of another size by the first of them, before anything is started; others are told when they come.

    A larger one would be trained on by a random piece of it at a time.
    """
    path, size = pictures.path(0), pictures.cut.size
    with suppress(CorruptExample):  # which is replaced like any other
        image = decoded(lambda: open_regular(path), name=path)
        if image.size != (size, size):
            raise ConfigError(
                f"{path} has {image.width} x {image.height} pixels, and CIFAR-10's images have {size} x {size}; resize "
                "them, or take data.name = 'image-folder', which cuts images of any size as its train_size and "
                "test_size say",
                path="data.settings.root",
            )


def _binary(files: Sequence[Path], cut: Cut) -> CifarRecords:
    counts = []
    for file in files:
        try:
            size = file.stat().st_size
        except OSError as error:
            raise ConfigError(
                f"{file} can't be read ({error.strerror}); give the folder of CIFAR-10's binary version (unpacked from "
                "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz), or one with train/CLASS/ and test/CLASS/",
                path="data.settings.root",
            ) from None
        if not size or size % _RECORD:
            raise ConfigError(
                f"{file} has {size} bytes, not a multiple of {_RECORD}; it is damaged, or of another data set",
                path="data.settings.root",
            )
        counts.append(size // _RECORD)
    names = tuple(map(str, files))
    if max(int(records[:, 0].max()) for records in _records(names)) > 9:
        raise ConfigError(f"{files[0].parent} has labels above 9; it isn't CIFAR-10", path="data.settings.root")
    return CifarRecords(names, tuple(counts), cut)
