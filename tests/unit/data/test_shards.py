"""Images in shards are those of the folders that they were made of, at every place that a run may go on from."""

import errno
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kfdist.data.feed import Serving, make_feed
from kfdist.data.reading import EVALUATION, SeededReader
from kfdist.data.sampler import Position, Sampler
from kfdist.data.sets import load_data
from kfdist.data.shards import ShardedPictures
from kfdist.data.task import DataSet
from kfdist.errors import ConfigError, EnvironmentFault
from tests.support.pictures import add_member, write_folders, write_shards


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataSet, DataSet]:
    """The same images in folders and in shards of seven."""
    root = tmp_path_factory.mktemp("pictures")
    folders = write_folders(root / "folders", classes=6, train=4, test=2)
    shards = write_shards(folders, root / "shards")
    sizes = {"train_size": 16, "test_size": 24, "test_resize": 32}
    return tuple(
        load_data(name, {"root": str(place), **sizes})
        for name, place in (("image-folder", folders), ("image-shards", shards))
    )  # type: ignore[return-value]


def test_pixels_and_labels_are_those_of_the_folders(both: tuple[DataSet, DataSet]):
    folders, shards = both
    assert (len(shards.train), len(shards.test), shards.classes) == (24, 12, 6)
    assert isinstance(shards.train, ShardedPictures) and len(shards.train.shards) == 4
    for part, epoch in (("train", 3), ("test", EVALUATION)):
        order = torch.randperm(len(getattr(shards, part))).tolist()
        expected, found = (SeededReader(data=getattr(each, part), seed=5).__getitems__((epoch, order)) for each in both)
        assert torch.equal(found.inputs, expected.inputs) and torch.equal(found.targets, expected.targets)


def test_a_resumed_run_sees_the_same_with_other_loader_processes_and_ranks(both: tuple[DataSet, DataSet]):
    """Two ranks from the beginning, without loader processes; and one rank from the middle, with one."""
    folders, shards = both

    def steps(data: DataSet, ranks: int, processes: int, begin: Position, count: int) -> list[torch.Tensor]:
        sampler = Sampler(examples=24, batch_size=8 // ranks, world_size=ranks, seed=2)
        parts = []
        for rank in range(ranks):
            serving = Serving(sampler=sampler, worker_rank=rank, device=torch.device("cpu"), loader_processes=processes)
            feed, position, seen = make_feed(data, serving, begin), begin, []
            for _ in range(count):
                seen += [inputs for inputs, _ in feed.training_step(position)]
                position = sampler.advance(position)
            feed.close()
            parts.append(seen)
        return [torch.cat(step) for step in zip(*parts, strict=True)]

    whole = steps(folders, 2, 0, Position(), 5)
    rest = steps(shards, 1, 1, Position(offset=16), 3)
    assert len(rest) == 3 and all(torch.equal(one, two) for one, two in zip(whole[2:], rest, strict=True))


def test_a_damaged_image_is_named_by_its_shard(tmp_path: Path):
    folders = write_folders(tmp_path / "folders", classes=2, train=2, test=1)
    (folders / "train" / "class_00" / "0001.jpg").write_bytes(b"no image")
    root = write_shards(folders, tmp_path / "shards")
    data = load_data("image-shards", {"root": str(root), "train_size": 16})
    batch = SeededReader(data=data.train, seed=0).__getitems__((0, [1, 2]))
    assert batch.targets.tolist() == [1, 1]
    (name,) = batch.corrupt
    assert name.startswith(f"{root / 'train-000000.tar'}, 8 bytes at ")


def test_more_shards_than_files_may_be_open(both: tuple[DataSet, DataSet], tmp_path: Path):
    (shard, *_), places = both[1].train.shards, both[1].train.places
    shards = [tmp_path / f"train-{number:06d}.tar" for number in range(300)]
    for each in shards:
        each.hardlink_to(shard)
    table = np.concatenate([[[number, *places[0, 1:]]] for number in range(len(shards))])
    data = ShardedPictures(tuple(map(str, shards)), table, np.zeros(len(shards), dtype=np.int64), both[1].train.cut)
    for _ in range(2):
        batch = SeededReader(data=data, seed=0).__getitems__((EVALUATION, range(len(shards))))
        assert len(batch.inputs) == len(shards) and not batch.corrupt
    open_now = [Path(os.path.realpath(each)) for each in Path("/proc/self/fd").iterdir()]
    assert 0 < sum(each.parent == tmp_path for each in open_now) <= 128


@pytest.mark.parametrize("part", [0, 1], ids=["folders", "shards"])
def test_an_image_is_not_corrupt_because_too_many_files_are_open(
    both: tuple[DataSet, DataSet], part: int, monkeypatch: pytest.MonkeyPatch
):
    def refused(*arguments: object, **options: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "some file")

    monkeypatch.setattr("builtins.open" if part == 0 else "kfdist.data.shards._opened", refused)
    with pytest.raises(EnvironmentFault, match=r"can't be opened: Too many open files; .*ulimit -n"):
        both[part].train[0]


def member(name: str, content: bytes) -> Callable[[Path], None]:
    def add(shard: Path) -> None:
        with tarfile.open(shard, "a") as tar:
            add_member(tar, name, content)

    return add


def compress(shard: Path) -> None:
    with tarfile.open(shard, "w:gz") as tar:
        add_member(tar, "0.cls", b"0")


def tear_off(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:1500])


def make_a_fifo(shard: Path) -> None:
    shard.unlink()
    os.mkfifo(shard)


def misname_a_class(shard: Path) -> None:
    member("9.cls", b"9" * 20)(shard)
    member("9.jpg", b"1")(shard)


def tear_a_member(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[: 3 * tarfile.BLOCKSIZE])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (Path.unlink, "no such file; give a glob"),
        (compress, "torn, or compressed.*a tar file, not compressed"),
        (tear_off, "torn, or compressed"),
        (tear_a_member, "unexpected end of data"),
        (member("9.jpg", b"1"), r"example '9' has \.jpg"),
        (member("9.cls", b"1"), r"example '9' has \.cls"),
        (member("9.json", b"1"), r"example '9' has \.json"),
        (make_a_fifo, "is no regular file"),
        (misname_a_class, r"the class of example '9' is '9{20}'"),
    ],
)
def test_shards_that_can_not_be_used_are_refused(tmp_path: Path, spoil: Callable[[Path], None], words: str):
    root = write_shards(write_folders(tmp_path / "folders", classes=2, train=2, test=1), tmp_path / "shards")
    spoil(root / "train-000000.tar")
    with pytest.raises(ConfigError, match=rf"^data\.settings\.train: .*{words}"):
        load_data("image-shards", {"root": str(root)})


def test_shards_of_one_class_are_refused(tmp_path: Path):
    root = write_shards(write_folders(tmp_path / "folders", classes=1, train=2, test=1), tmp_path / "shards")
    with pytest.raises(ConfigError, match=r"^data\.settings\.train: .*has images of class 0 alone"):
        load_data("image-shards", {"root": str(root)})


@pytest.mark.parametrize("pattern", ["/data/train-*.tar", "."])
def test_a_pattern_that_is_no_glob_below_the_root_is_refused(tmp_path: Path, pattern: str):
    with pytest.raises(ConfigError, match=rf"^data\.settings\.train: is '{re.escape(pattern)}'; give a glob rel"):
        load_data("image-shards", {"root": str(tmp_path), "train": pattern})


@pytest.mark.parametrize(("label", "words"), [(b"cat", "class of example '9' is 'cat'"), (b"7", "has class 7.*at 1")])
def test_labels_that_can_not_be_used_are_refused(tmp_path: Path, label: bytes, words: str):
    root = write_shards(write_folders(tmp_path / "folders", classes=2, train=2, test=1), tmp_path / "shards")
    with tarfile.open(root / "val-000000.tar", "a") as tar:
        add_member(tar, "9.jpg", b"1")
        add_member(tar, "9.cls", label)
    with pytest.raises(ConfigError, match=rf"^data\.settings\.test: .*{words}"):
        load_data("image-shards", {"root": str(root)})
