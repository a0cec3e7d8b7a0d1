"""Examples read one by one: seeded by (seed, epoch, example), whoever reads them; what can't be read is replaced."""

import gc
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from kfdist.data import DataSet, Examples
from kfdist.data.feed import LoaderFeed, Serving, make_feed
from kfdist.data.overdue import Overdue
from kfdist.data.reading import EVALUATION, Batch, CorruptExample, SeededReader
from kfdist.data.sampler import Position, Sampler
from kfdist.errors import ConfigError, EnvironmentFault
from tests.support.waits import eventually


@dataclass(frozen=True)
class Noisy:
    """Draws from all three global generators; some of its examples are corrupt."""

    count: int = 20
    corrupt: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index in self.corrupt:
            raise CorruptExample(f"file {index}", "torn")
        return torch.tensor([index, torch.rand(()).item(), random.random(), np.random.rand()]), index


def serving(*, rank: int = 0, world_size: int = 1, micro_batches: int = 1, loader_processes: int = 0) -> Serving:
    sampler = Sampler(examples=20, batch_size=4, world_size=world_size, seed=3)
    return Serving(
        sampler=sampler,
        worker_rank=rank,
        device=torch.device("cpu"),
        micro_batches=micro_batches,
        seed=7,
        loader_processes=loader_processes,
    )


def steps(data: DataSet, how: Serving, start: Position, count: int) -> torch.Tensor:
    feed, position, seen = make_feed(data, how, start), start, []
    for _ in range(count):
        seen += [inputs for inputs, _ in feed.training_step(position)]
        position = how.sampler.advance(position)
    feed.close()
    return torch.cat(seen)


def test_what_is_seen_depends_on_neither_the_start_nor_the_parts_nor_the_loader_processes():
    data = DataSet(train=Noisy(), test=Noisy(), classes=20)
    whole = steps(data, serving(), Position(), 8)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    later = steps(data, serving(micro_batches=2, loader_processes=2), Position(epoch=0, offset=12), 5)
    assert torch.equal(whole[12:], later)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    by_index = [whole[:20][index] for index in whole[:20, 0].argsort()]
    again = {int(row[0]): row for row in whole[20:]}
    assert len(again) == 12
    assert all((by_index[index][1:] != row[1:]).all() for index, row in again.items()), "epochs have the same noise"


def test_tensors_in_memory_come_in_the_same_order_as_examples_that_are_read():
    examples = Examples(inputs=torch.arange(20.0)[:, None].repeat(1, 4), labels=torch.arange(20))
    in_memory = DataSet(train=examples, test=examples, classes=20)
    for how in (serving(rank=1, world_size=2, micro_batches=2), serving()):
        read = steps(DataSet(train=Noisy(), test=Noisy(), classes=20), how, Position(), 3)
        assert torch.equal(steps(in_memory, how, Position(), 3)[:, 0], read[:, 0])


def test_the_next_example_takes_the_place_of_a_corrupt_one_and_evaluation_leaves_it_out():
    reader = SeededReader(data=Noisy(corrupt=(4, 5)), seed=0)
    batch = reader.__getitems__((0, [3, 4, 9]))
    assert batch.targets.tolist() == [3, 6, 9]
    assert batch.corrupt == {"file 4": "torn", "file 5": "torn"}
    assert reader.__getitems__((EVALUATION, [3, 4, 9])).targets.tolist() == [3, 9]
    with pytest.raises(EnvironmentFault, match="100 examples in a row can't be read; .*torn"):
        SeededReader(data=Noisy(corrupt=tuple(range(20))), seed=0).__getitems__((0, [3]))
    feed = make_feed(DataSet(train=Noisy(), test=Noisy(corrupt=(1, 4)), classes=20), serving(), Position())
    assert isinstance(feed, LoaderFeed)
    assert [len(targets) for _, targets in feed.evaluation()] == [3, 3, 4, 4, 4]
    assert feed.take_corrupt() == {"file 1": "torn", "file 4": "torn"} and feed.take_corrupt() == {}


def test_an_evaluation_leaves_out_a_batch_of_which_nothing_can_be_read():
    damaged = Noisy(count=17, corrupt=(4, 5, 6, 7, 16))
    feed = make_feed(DataSet(train=Noisy(), test=damaged, classes=20), serving(), Position())
    assert [targets.tolist() for _, targets in feed.evaluation()] == [[0, 1, 2, 3], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert len(feed.take_corrupt()) == 5


def test_what_a_data_set_raises_is_not_taken_for_the_end_of_its_process():
    feed = make_feed(DataSet(train=Noisy(), test=Noisy(), classes=20), serving(), Position())
    assert isinstance(feed, LoaderFeed)

    def told(error: type[Exception], words: str) -> Iterator[Batch]:
        raise error(words.format("Caught an exception in DataLoader worker process 0.\nTraceback:\n"))
        yield

    def receive(error: type[Exception], words: str) -> None:
        list(feed._received(told(error, words)))

    with pytest.raises(RuntimeError, match=r"^Caught (.|\n)*sizes differ$"):
        receive(RuntimeError, "{}RuntimeError: sizes differ\n")
    for words in ("no file can be opened", "{}kfdist.errors.EnvironmentFault: no file can be opened\n"):
        with pytest.raises(EnvironmentFault, match=r"^no file can be opened$"):
            receive(EnvironmentFault, words)


class Dying(Noisy):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        import os

        os.kill(os.getpid(), 9)
        raise AssertionError


def test_a_loader_process_that_dies_is_a_sentence():
    with pytest.raises(EnvironmentFault, match=r"a loader process died .*data\.loader_processes"):
        steps(DataSet(train=Dying(), test=Noisy(), classes=20), serving(loader_processes=1), Position(), 1)


@dataclass(frozen=True)
class Failing(Noisy):
    """Raises in one loader process; the other one reads, or hangs."""

    hangs: bool = False

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        process = torch.utils.data.get_worker_info()
        assert process is not None
        if process.id == 0:
            raise ValueError("sizes differ")
        if self.hangs:
            time.sleep(60)
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("part", "hangs"), [("train", False), ("test", False), pytest.param("train", True, marks=pytest.mark.slow)]
)
def test_what_a_data_set_raises_in_one_loader_process_ends_the_others(part: str, hangs: bool):
    before = set(multiprocessing.active_children())
    train, test = (Failing(hangs=hangs), Noisy()) if part == "train" else (Noisy(), Failing(hangs=hangs))
    feed = make_feed(DataSet(train=train, test=test, classes=20), serving(loader_processes=2), Position())
    with pytest.raises(ValueError, match="sizes differ") as held:
        list(feed.training_step(Position()) if part == "train" else feed.evaluation())
    assert held.tb is not None  # has torch's frames, and they the loader
    assert set(multiprocessing.active_children()) <= before


def test_closing_ends_loader_processes_that_somebody_still_holds():
    before = set(multiprocessing.active_children())
    feed = make_feed(DataSet(train=Noisy(), test=Noisy(), classes=20), serving(loader_processes=1), Position())
    batches = feed.evaluation()
    next(batches)
    next(feed.training_step(Position()))
    assert len(set(multiprocessing.active_children()) - before) == 2
    feed.close()
    assert set(multiprocessing.active_children()) <= before
    feed.close()
    del batches


LOADING = """
import torch
from kfdist.data.feed import Serving, make_feed
from kfdist.data.sampler import Position, Sampler
from kfdist.data.sets import load_data
from kfdist.errors import EnvironmentFault

data = load_data("synthetic-images", {"train_examples": 8, "test_examples": 2, "size": 8, "classes": 2})
sampler = Sampler(examples=8, batch_size=4, world_size=1, seed=0)
serving = Serving(sampler=sampler, worker_rank=0, device=torch.device("cpu"), loader_processes=1)
try:
    next(make_feed(data, serving, Position()).training_step(Position()))
except EnvironmentFault as fault:
    print(fault)
"""


def test_a_directory_for_temporary_files_that_is_too_long_for_sockets_is_a_sentence(tmp_path: Path):
    """As the directories of jobs are on some clusters."""
    directory = tmp_path / ("deep" * 30)
    directory.mkdir()
    variables = {**os.environ, "TMPDIR": str(directory)}
    command = [sys.executable, "-c", LOADING]
    said = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert f"{directory}, where their sockets would be" in said.stdout, said.stderr
    assert "set TMPDIR to a shorter one" in said.stdout


@pytest.mark.filterwarnings("ignore:Got pickle error")
def test_what_loader_processes_can_not_be_sent_is_a_sentence():
    class Local(Noisy):
        pass

    words = r"^data\.name: {} can't be sent to loader processes \(.*data\.loader_processes = 0"
    feed = make_feed(DataSet(train=Local(), test=Local(), classes=20), serving(loader_processes=1), Position())
    with pytest.raises(ConfigError, match=words.format("train")):
        next(feed.training_step(Position()))
    with pytest.raises(ConfigError, match=words.format("test")):
        next(feed.evaluation())


def test_an_evaluation_leaves_the_examples_in_memory_as_they_were():
    examples = Examples(inputs=torch.full((20, 1), 255.0), labels=torch.zeros(20, dtype=torch.int64))
    data = DataSet(train=examples, test=examples, classes=1, prepare=lambda inputs: inputs.div_(255.0))
    for _ in range(2):
        assert all(inputs.eq(1.0).all() for inputs, _ in make_feed(data, serving(), Position()).evaluation())


class Slow(Noisy):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        time.sleep(0.25)
        return super().__getitem__(index)


@pytest.mark.parametrize("loader_processes", [0, 1])
def test_a_batch_that_does_not_come_is_told_again_and_again(caplog: pytest.LogCaptureFixture, loader_processes: int):
    how = serving(rank=1, world_size=2, loader_processes=loader_processes)
    feed = make_feed(DataSet(train=Slow(), test=Noisy(), classes=20), how, Position())
    assert isinstance(feed, LoaderFeed)
    feed._overdue = Overdue(worker_rank=1, loader_processes=loader_processes, seconds=0.2)
    list(feed.training_step(Position()))  # four examples
    feed.close()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) >= 2, "one a fifth of a second, of one at least"
    assert all(text.startswith("rank 1 has waited ") for text in told)
    assert f" s for a batch (data.loader_processes is {loader_processes}), and all ranks wait with it" in told[0]


def test_a_step_that_takes_long_is_no_wait_for_a_batch(caplog: pytest.LogCaptureFixture):
    overdue = Overdue(worker_rank=0, loader_processes=1, seconds=0.1)
    nothing = Batch(torch.zeros(0), torch.zeros(0), {})
    for _ in overdue.watched([nothing, nothing]):
        time.sleep(0.4)
    overdue.close()
    assert caplog.records == []


def test_nobody_watches_for_a_feed_that_is_closed_or_forgotten():
    def watchers() -> set[threading.Thread]:
        return {each for each in threading.enumerate() if each.name == "kfdist-overdue"}

    for forgotten in (False, True):
        before = watchers()
        feed = make_feed(DataSet(train=Noisy(), test=Noisy(), classes=20), serving(), Position())
        list(feed.training_step(Position()))
        assert watchers() - before
        if not forgotten:
            feed.close()
        del feed
        gc.collect()
        eventually(lambda before=before: watchers() - before, lambda left: not left)
