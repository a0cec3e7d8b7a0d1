"""Folders of JPEGs that a small network can tell apart, and CIFAR-10 files of the right form."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def write_folders(root: Path, *, classes: int, train: int, test: int, size: int = 40) -> Path:
    """Writes root/train/CLASS/ and root/val/CLASS/: images of the class's colour, with noise, of various shapes.

    Args:
        root: Where; made.
        classes: How many classes.
        train: Training images of each.
        test: Test images of each.
        size: About the height and width.
    """
    random = np.random.default_rng(0)
    colours = random.integers(40, 216, (classes, 3))
    for part, count in (("train", train), ("val", test)):
        for label, colour in enumerate(colours):
            folder = root / part / f"class_{label:02d}"
            folder.mkdir(parents=True)
            for number in range(count):
                noise = random.normal(0, 25, (size + number % 3, size + number % 5, 3))
                pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:04d}.jpg")
    return root


def write_shards(folders: Path, root: Path, *, each: int = 7) -> Path:
    """Puts the images of `write_folders` into root/train-*.tar and root/val-*.tar, `each` in a shard, in order."""
    root.mkdir(parents=True)
    for part in ("train", "val"):
        classes = sorted((folders / part).iterdir())
        images = [(label, file) for label, folder in enumerate(classes) for file in sorted(folder.iterdir())]
        for first in range(0, len(images), each):
            with tarfile.open(root / f"{part}-{first // each:06d}.tar", "w") as tar:
                for number, (label, file) in enumerate(images[first : first + each], start=first):
                    add_member(tar, f"{number:06d}.cls", str(label).encode())
                    add_member(tar, f"{number:06d}.jpg", file.read_bytes())
    return root


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file to a tar file."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def tear(file: Path) -> None:
    """Cuts an image off in its middle."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def write_cifar10(root: Path, *, each: int) -> np.ndarray:
    """Writes the six files of CIFAR-10's binary version, `each` images in each; returns all records in order."""
    root.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    names = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    records = random.integers(0, 256, (len(names), each, 3073), dtype=np.uint8)
    records[:, :, 0] = np.arange(each) % 10
    for name, part in zip(names, records, strict=True):
        (root / name).write_bytes(part.tobytes())
    return records.reshape(-1, 3073)
