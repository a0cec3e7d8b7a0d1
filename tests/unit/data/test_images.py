"""Images from folders, from CIFAR-10's files and from nowhere: what a batch of them is, and what is refused."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kfdist.data.cifar10 import CifarRecords
from kfdist.data.feed import Serving, make_feed
from kfdist.data.images import IMAGENET, Cut, Pictures, decoded, read_picture
from kfdist.data.reading import EVALUATION, CorruptExample, SeededReader
from kfdist.data.sampler import Position, Sampler
from kfdist.data.sets import load_data
from kfdist.errors import ConfigError
from tests.support.pictures import tear, write_cifar10, write_folders


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("pictures"), classes=6, train=4, test=2)


def load(root: Path, **settings: object):
    return load_data("image-folder", {"root": str(root), "train_size": 16, "test_size": 24, **settings})


def reader(data, part: str = "train", seed: int = 1) -> SeededReader:
    return SeededReader(data=getattr(data, part), seed=seed)


def test_a_folder_has_its_classes_and_its_pixels(root: Path):
    data = load(root, test_resize=32)
    assert (len(data.train), len(data.test), data.classes, data.example_shape) == (24, 12, 6, (3, 16, 16))
    assert data.objective.metrics == ("accuracy", "top5_accuracy")
    pixels, labels, _ = reader(data, "test").__getitems__((EVALUATION, [0, 5]))
    assert (pixels.dtype, pixels.shape, labels.tolist()) == (torch.uint8, (2, 3, 24, 24), [0, 2])
    with Image.open(root / "val" / "class_02" / "0001.jpg") as image:
        width, height = image.size
        shorter = image.resize((32, 32 * height // width) if width < height else (32 * width // height, 32), 2)
    left, top = round((shorter.width - 24) / 2), round((shorter.height - 24) / 2)
    expected = np.asarray(shorter.crop((left, top, left + 24, top + 24))).transpose(2, 0, 1)
    assert torch.equal(pixels[1], torch.from_numpy(expected.copy()))
    numbers = IMAGENET(pixels)
    assert numbers[1, 2, 3, 4].item() == pytest.approx((pixels[1, 2, 3, 4].item() / 255 - 0.406) / 0.225, abs=1e-5)


def test_crops_depend_on_seed_epoch_and_index_alone(root: Path):
    data = load(root)
    first = reader(data).__getitems__((0, list(range(24)))).inputs
    assert torch.equal(first, reader(data).__getitems__((0, list(range(24)))).inputs)
    assert torch.equal(first[[7, 3]], pickle.loads(pickle.dumps(reader(data))).__getitems__((0, [7, 3])).inputs)
    for other in (reader(data).__getitems__((1, [7])), reader(data, seed=2).__getitems__((0, [7]))):
        assert not torch.equal(first[7], other.inputs[0])


def test_loader_processes_read_what_the_rank_would(root: Path):
    data, sampler = load(root), Sampler(examples=24, batch_size=4, world_size=1, seed=0)
    seen = []
    for processes in (0, 1):
        how = Serving(
            sampler=sampler, worker_rank=0, device=torch.device("cpu"), loader_processes=processes, channels_last=True
        )
        feed, position = make_feed(data, how, Position(offset=12)), Position(offset=12)
        for _ in range(5):
            seen += feed.training_step(position)
            position = sampler.advance(position)
        seen += feed.evaluation()
        feed.close()
    half = len(seen) // 2
    assert half == 5 + 3
    for one, two in zip(seen[:half], seen[half:], strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
        assert one[0].is_contiguous(memory_format=torch.channels_last)


def test_a_torn_file_is_named_and_replaced(tmp_path: Path):
    data = load(write_folders(tmp_path, classes=2, train=3, test=1))
    torn, empty = tmp_path / "train" / "class_00" / "0001.jpg", tmp_path / "train" / "class_01" / "0000.jpg"
    tear(torn)
    empty.write_bytes(b"")
    batch = reader(data).__getitems__((0, [1, 3]))
    assert batch.targets.tolist() == [0, 1]
    assert set(batch.corrupt) == {str(torn), str(empty)}
    assert "truncated" in batch.corrupt[str(torn)]
    assert batch.corrupt[str(empty)] == "cannot identify image file"


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"), ("1", "png")]
)
def test_all_images_become_red_green_and_blue(tmp_path: Path, mode: str, suffix: str):
    colours = Image.new("RGB", (4, 4), (255, 255, 255))
    colours.convert(mode).save(tmp_path / f"x.{suffix}")
    decoded_image = decoded(lambda: open(tmp_path / f"x.{suffix}", "rb"), name="x")
    assert decoded_image.mode == "RGB" and np.asarray(decoded_image).min() > 250


def test_16_bits_become_8_and_32_have_no_range(tmp_path: Path):
    """Pillow would cut both off at 255, and train on white pictures."""
    numbers = np.arange(0, 65536, 4096, dtype=np.uint16).reshape(4, 4)
    Image.fromarray(numbers).save(tmp_path / "16.png")
    Image.fromarray(numbers.astype(np.float32)).save(tmp_path / "32.tiff")
    read = np.asarray(decoded(lambda: open(tmp_path / "16.png", "rb"), name="16"))
    assert read.shape == (4, 4, 3) and (read[..., 1] == numbers // 256).all()
    with pytest.raises(CorruptExample, match="32-bit numbers of no known range"):
        decoded(lambda: open(tmp_path / "32.tiff", "rb"), name="32")


def test_what_pillow_can_not_decode_is_named(tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.dds")
    content = bytearray((tmp_path / "x.dds").read_bytes())
    content[80] = 1  # a pixel format that is for alpha alone
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(CorruptExample, match="Unknown pixel format"):
        decoded(lambda: open(tmp_path / "x.jpg", "rb"), name="x")


@pytest.mark.parametrize(
    ("size", "cut", "words"),
    [
        ((3000, 1), Cut(kind="centre", size=224, margin=256), "3000 pixels along 1, and more than fit in memory"),
        ((8, 30), Cut(kind="padded", size=32, margin=4), "8 x 30 pixels, and 32 x 32 are needed"),
        ((64, 64), Cut(kind="padded", size=32, margin=4), "64 x 64 pixels, and 32 x 32 are needed"),
        ((64, 64), Cut(kind="whole", size=32), "64 x 64 pixels, and 32 x 32 are needed"),
    ],
)
def test_an_image_that_can_not_be_cut_is_named(size: tuple[int, int], cut: Cut, words: str, tmp_path: Path):
    """One of 3000 pixels by one would have two hundred million once it is 256 high."""
    Image.new("RGB", size).save(tmp_path / "x.png")
    with pytest.raises(CorruptExample) as caught:
        read_picture(lambda: open(tmp_path / "x.png", "rb"), cut, name="x")
    assert caught.value.name == "x" and words in caught.value.reason


def test_cifar_10_is_read_from_its_binary_files_and_from_folders(tmp_path: Path):
    records = write_cifar10(tmp_path / "files" / "cifar-10-batches-bin", each=20)
    data = load_data("cifar10", {"root": str(tmp_path / "files")})
    assert isinstance(data.train, CifarRecords)
    assert (len(data.train), len(data.test), data.classes, data.example_shape) == (100, 20, 10, (3, 32, 32))
    whole = reader(data, "test").__getitems__((EVALUATION, [0, 13]))
    assert torch.equal(whole.inputs.flatten(1), torch.from_numpy(records[[100, 113], 1:]))
    assert whole.targets.tolist() == [0, 3]
    padded = torch.nn.functional.pad(torch.from_numpy(records[47, 1:].reshape(3, 32, 32).copy()), (4, 4, 4, 4))
    cut = reader(data).__getitems__((0, [47])).inputs[0]
    views = (padded[:, top : top + 32, left : left + 32] for top in range(9) for left in range(9))
    assert any(torch.equal(cut, each) for view in views for each in (view, view.flip(2)))
    write_folders(tmp_path / "folders", classes=10, train=1, test=1, size=32).joinpath("val").rename(
        tmp_path / "folders" / "test"
    )
    assert isinstance(load_data("cifar10", {"root": str(tmp_path / "folders")}).train, Pictures)


@pytest.mark.parametrize(("train", "test"), [(64, 32), (32, 64)])
def test_folders_of_other_images_are_not_taken_for_cifar_10(tmp_path: Path, train: int, test: int):
    """They were trained on by random pieces of 32 x 32, without a word."""
    root = write_folders(tmp_path / "root", classes=2, train=1, test=1, size=train)
    other = write_folders(tmp_path / "other", classes=2, train=1, test=1, size=test)
    (other / "val").rename(root / "test")
    with pytest.raises(ConfigError, match=r"0000\.jpg has 64 x 64 pixels, and CIFAR-10's .*32 x 32; .*'image-folder'"):
        load_data("cifar10", {"root": str(root)})


def test_one_image_of_another_size_is_named_and_replaced(tmp_path: Path):
    root = write_folders(tmp_path, classes=2, train=1, test=1, size=32)
    (root / "val").rename(root / "test")
    odd = root / "train" / "class_01" / "0000.jpg"
    Image.new("RGB", (64, 64)).save(odd)
    batch = reader(load_data("cifar10", {"root": str(root)})).__getitems__((0, [1]))
    assert batch.targets.tolist() == [0] and list(batch.corrupt) == [str(odd)]


def test_a_fifo_among_the_images_is_named_and_replaced(tmp_path: Path):
    """To open it waited for a writer that never came."""
    data = load(write_folders(tmp_path, classes=2, train=2, test=1))
    fifo = tmp_path / "train" / "class_00" / "0001.jpg"
    fifo.unlink()
    os.mkfifo(fifo)
    batch = reader(data).__getitems__((0, [1]))
    assert batch.targets.tolist() == [1] and batch.corrupt == {str(fifo): "it is no regular file"}


def test_synthetic_images_are_those_of_imagenets_size():
    data = load_data("synthetic-images", {})
    assert (len(data.train), data.classes, data.example_shape) == (1_281_167, 1000, (3, 224, 224))


def lack_a_class(root: Path) -> None:
    (root / "val" / "class_01").rename(root / "val" / "other")


def keep_one_class(root: Path) -> None:
    for part in ("train", "val"):
        shutil.rmtree(root / part / "class_01")


def empty_a_class(root: Path) -> None:
    next((root / "train" / "class_01").iterdir()).unlink()


@pytest.mark.parametrize(
    ("spoil", "settings", "words"),
    [
        (lambda root: None, {"train_dir": "trein"}, "No such file or directory.*a folder of images for each class"),
        (lack_a_class, {}, r"have different classes, such as \['class_01', 'other'\]"),
        (empty_a_class, {}, "class_01.*a folder of images for each class"),
        (keep_one_class, {}, "train has one class, 'class_00', .*each of two classes or more"),
        (lambda root: None, {"test_resize": 9}, "is 9, less than test_size = 24"),
    ],
)
def test_folders_that_do_not_fit_are_refused(
    tmp_path: Path, spoil: Callable[[Path], None], settings: dict[str, object], words: str
):
    spoil(write_folders(tmp_path, classes=2, train=1, test=1))
    with pytest.raises(ConfigError, match=rf"^data\.settings\.(root|test_resize): .*{words}"):
        load(tmp_path, **settings)


@pytest.mark.parametrize("name", ["image-folder", "image-shards", "cifar10"])
def test_a_home_that_nobody_has_is_a_folder_that_is_not_there(name: str):
    with pytest.raises(ConfigError, match="~no-such-user/pictures"):
        load_data(name, {"root": "~no-such-user/pictures"})


def test_files_that_are_not_cifar_10_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"data_batch_1\.bin can't be read .*cifar-10-binary\.tar\.gz"):
        load_data("cifar10", {"root": str(tmp_path)})
    write_cifar10(tmp_path, each=2)
    (tmp_path / "data_batch_3.bin").write_bytes(b"x" * 3074)
    with pytest.raises(ConfigError, match=r"data_batch_3\.bin has 3074 bytes, not a multiple of 3073"):
        load_data("cifar10", {"root": str(tmp_path)})
    (tmp_path / "data_batch_3.bin").write_bytes(b"\xff" * 3073)
    with pytest.raises(ConfigError, match="has labels above 9"):
        load_data("cifar10", {"root": str(tmp_path)})
