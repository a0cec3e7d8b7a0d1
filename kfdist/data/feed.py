"""Where a rank's batches come from: tensors in memory, or a data set that loader processes read ahead of the steps."""

import multiprocessing
import signal
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pickle import PicklingError
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from kfdist.data.overdue import Overdue
from kfdist.data.reading import EVALUATION, Batch, SeededReader
from kfdist.data.sampler import Position, Sampler
from kfdist.data.task import DataSet, Examples
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.torch_internals import end_loader_processes

_TEST_BATCH = 512
"""Examples in memory evaluated at once; bounds the memory, changes nothing else."""

_DEAD = "DataLoader worker (pid"
"""How torch begins to say that a loader process ended: "(pid 7) is killed by signal", "(pid(s) 7) exited"."""

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How batches reach a rank.

    Attributes:
        sampler: Deals the examples to the ranks.
        worker_rank: This rank.
        device: Where the batches go.
        micro_batches: Parts that a step's examples come in.
        seed: The run's seed.
        loader_processes: Processes that read ahead, for training and for evaluation each; 0: the rank reads by itself.
        channels_last: Whether images are laid out with their channels last.
    """

    sampler: Sampler
    worker_rank: int
    device: torch.device
    micro_batches: int = 1
    seed: int = 0
    loader_processes: int = 0
    channels_last: bool = False

    @property
    def micro_size(self) -> int:
        """Examples of a micro-batch."""
        return self.sampler.batch_size // self.micro_batches


@dataclass
class Feed(ABC):
    """A rank's batches of training and of evaluation, on its device.

    Attributes:
        data: The task.
        serving: How batches reach the rank.
        corrupt: Why examples couldn't be read, by name; those since the last `take_corrupt`.
    """

    data: DataSet
    serving: Serving
    corrupt: dict[str, str] = field(default_factory=dict)

    @abstractmethod
    def training_step(self, position: Position) -> Iterator[Pair]:
        """Yields the micro-batches of the step at `position`; steps must be asked for in their order."""

    @abstractmethod
    def evaluation(self) -> Iterator[Pair]:
        """Yields this rank's share of the test examples."""

    @abstractmethod
    def close(self) -> None:
        """Ends what reads ahead."""

    def take_corrupt(self) -> dict[str, str]:
        """Returns, once, what couldn't be read."""
        taken, self.corrupt = self.corrupt, {}
        return taken

    def _ready(self, inputs: Tensor, targets: Tensor) -> Pair:
        device = self.serving.device
        inputs = self.data.prepare(inputs.to(device, non_blocking=True))
        if self.serving.channels_last and inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return inputs, targets.to(device, non_blocking=True)


@dataclass
class MemoryFeed(Feed):
    """Batches of tensors in memory; the training examples are on the device already."""

    _order: tuple[int, Tensor] | None = None

    @override
    def training_step(self, position: Position) -> Iterator[Pair]:
        serving, train = self.serving, self.data.train
        assert isinstance(train, Examples)
        if self._order is None or self._order[0] != position.epoch:
            self._order = (position.epoch, serving.sampler.permutation(position.epoch).to(train.labels.device))
        indices = self._order[1][serving.sampler.share(position, serving.worker_rank)]
        for part in indices.split(serving.micro_size):
            yield self._ready(train.inputs[part], train.labels[part])

    @override
    def evaluation(self) -> Iterator[Pair]:
        test, serving = self.data.test, self.serving
        assert isinstance(test, Examples)
        share = slice(serving.worker_rank, None, serving.sampler.world_size)
        inputs, labels = test.inputs[share], test.labels[share]
        for first in range(0, len(labels), _TEST_BATCH):
            part = slice(first, first + _TEST_BATCH)
            # A copy: `prepare` and the model may write to it, and the examples are evaluated again.
            yield self._ready(inputs[part].clone(), labels[part].clone())

    @override
    def close(self) -> None:
        pass


class LoaderFeed(Feed):
    """Batches that processes read from a `Readable`, each as far ahead as torch's DataLoader lets it.

    The processes come from a fork server, a fresh interpreter without threads, gRPC or CUDA, so that a fork carries
    nothing along. They ignore SIGINT and SIGTERM, which torchrun and terminals send to the whole group while ranks
    still write a checkpoint, and end with the feed, with an error of a data set, and with their rank.

    Args:
        data: The task.
        serving: How batches reach the rank.
        start: Where the first step is.
    """

    def __init__(self, data: DataSet, serving: Serving, start: Position) -> None:
        super().__init__(data, serving)
        self._next = start
        self._training: Iterator[Batch] | None = None
        self._evaluation: DataLoader[Batch] | None = None
        self._overdue = Overdue(worker_rank=serving.worker_rank, loader_processes=serving.loader_processes)

    @override
    def training_step(self, position: Position) -> Iterator[Pair]:
        assert position == self._next, f"asked for {position}, reading ahead from {self._next}"
        if self._training is None:
            schedule = _TrainingSchedule(serving=self.serving, start=position)
            with _sent("train"):
                self._training = iter(self._loader(self.data.train, schedule))
        yield from self._received(islice(self._training, self.serving.micro_batches))
        self._next = self.serving.sampler.advance(position)

    @override
    def evaluation(self) -> Iterator[Pair]:
        if self._evaluation is None:
            serving = self.serving
            share = range(serving.worker_rank, len(self.data.test), serving.sampler.world_size)
            size = serving.micro_size
            batches = [(EVALUATION, share[first : first + size]) for first in range(0, len(share), size)]
            self._evaluation = self._loader(self.data.test, batches)
        with _sent("test"):
            received = iter(self._evaluation)
        yield from self._received(received)

    @override
    def close(self) -> None:
        for source in (self._training, self._evaluation):
            end_loader_processes(source)
        self._training = self._evaluation = None
        self._overdue.close()

    def _received(self, batches: Iterable[Batch]) -> Iterator[Pair]:
        try:
            for batch in self._overdue.watched(batches):
                self.corrupt |= batch.corrupt
                if len(batch.targets):
                    yield self._ready(batch.inputs, batch.targets)
        except Exception as error:
            self.close()  # its traceback keeps the loader, whose other processes would read on while anybody holds it
            if (told := _in_own_words(error)) is None:
                raise
            raise told from error

    def _loader(self, examples: Any, schedule: Any) -> "DataLoader[Batch]":
        processes = self.serving.loader_processes
        options: dict[str, Any] = {}
        if processes:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["kfdist.data.feed"])
            options = {"multiprocessing_context": context, "persistent_workers": True, "worker_init_fn": _ignore_stops}
        return DataLoader(
            SeededReader(data=examples, seed=self.serving.seed),  # type: ignore[arg-type]
            batch_sampler=schedule,
            num_workers=processes,
            collate_fn=_as_read,
            pin_memory=self.serving.device.type == "cuda",
            # Its own, else the loader would draw from the generator that dropout draws from.
            generator=torch.Generator(device="cpu").manual_seed(0),
            **options,
        )


@dataclass(frozen=True, kw_only=True)
class _TrainingSchedule:
    """The micro-batches of all steps from `start` on, without end."""

    serving: Serving
    start: Position

    def __iter__(self) -> Iterator[tuple[int, Sequence[int]]]:
        sampler, position = self.serving.sampler, self.start
        epoch, order = position.epoch, sampler.permutation(position.epoch)
        while True:
            if position.epoch != epoch:
                epoch, order = position.epoch, sampler.permutation(position.epoch)
            for part in order[sampler.share(position, self.serving.worker_rank)].split(self.serving.micro_size):
                yield epoch, part.tolist()
            position = sampler.advance(position)


@contextmanager
def _sent(part: str) -> Iterator[None]:
    # Not tried before: only the loader knows what can be sent (locks, shared memory), and it shares what is large.
    try:
        yield
    except (PicklingError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{part} can't be sent to loader processes ({error}); let it hold paths and numbers, and functions by "
            "name, or set data.loader_processes = 0",
            path="data.name",
        ) from error
    except OSError as error:
        if "AF_UNIX path too long" not in str(error):
            raise
        raise EnvironmentFault(
            f"loader processes can't be started: {tempfile.gettempdir()}, where their sockets would be, is too long "
            "for their names; set TMPDIR to a shorter one, such as /tmp, or data.loader_processes = 0"
        ) from error


def _in_own_words(error: Exception) -> EnvironmentFault | None:
    """Returns what is said in the place of an error that came while reading; None where it says it itself."""
    if isinstance(error, EnvironmentFault):
        _, raised_there, words = str(error).rpartition(f"{EnvironmentFault.__name__}: ")
        return EnvironmentFault(words.strip()) if raised_there else None  # they come behind a process's traceback
    if isinstance(error, RuntimeError) and str(error).startswith(_DEAD):  # what the data set raised names it, too
        return EnvironmentFault(
            f"a loader process died ({error}); if it was killed for want of memory, lower data.loader_processes"
        )
    return None


def _ignore_stops(loader_process: int) -> None:
    del loader_process
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _as_read(batch: Any) -> Any:
    return batch


def make_feed(data: DataSet, serving: Serving, start: Position) -> Feed:
    """Makes a rank's feed.

    Args:
        data: The task; tensors in memory are on the rank's device.
        serving: How batches reach the rank.
        start: Where the first step is.
    """
    in_memory = isinstance(data.train, Examples) and isinstance(data.test, Examples)
    return MemoryFeed(data, serving) if in_memory else LoaderFeed(data, serving, start)
