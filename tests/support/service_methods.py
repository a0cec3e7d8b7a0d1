"""Runs of every method by the trainer itself on two ranks, and the service that inverts for them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kfdist.comm.communicator import Communicator
from kfdist.config import load_config
from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.runtime.plan.coverage import CoverageRow
from kfdist.training.checkpoint import CheckpointStore
from kfdist.training.copies import Copies
from kfdist.training.history import History
from kfdist.training.method import agree_on_costs
from kfdist.training.progress import Progress
from kfdist.training.reporting import MetricsLog
from kfdist.training.run_state import Standing, Training
from kfdist.training.setup import gather_materials, make_training
from kfdist.training.summary import parameter_sha256
from kfdist.training.trainer import Trainer
from tests.support.held import held_since, storages
from tests.support.ranks import run_ranks

RANKS, OWNERS = 2, 2


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a rank saw of a run.

    Attributes:
        parameters: Digest of the parameters at the end.
        accuracy: On the test data, at the end.
        counters: The preconditioner's totals.
        methods: Each block's method.
        adopted: Each block's preconditioner in use at the end, its class.
        coverage: The preconditioner's report.
        held: Bytes of what the rank held at the end, beside the data.
    """

    parameters: str
    accuracy: float
    counters: Mapping[str, Any]
    methods: Mapping[str, str]
    adopted: Mapping[str, type[AbstractPreconditioner]]
    coverage: Sequence[CoverageRow]
    held: int


@contextmanager
def service(folder: Path) -> Iterator[str]:
    """Starts a controller and owners, in processes of their own without a Ray; gives the controller's address."""
    # Ranks read this file, too, and do without gRPC.
    from tests.support.controller import ControllerThread
    from tests.support.owners import OwnerProcess

    with ControllerThread(folder / "control.sqlite") as controller, ExitStack() as owners:
        for number in range(OWNERS):
            owners.enter_context(OwnerProcess(f"owner-{number}", folder=folder, controller=controller.address))
        yield controller.address


def train(folder: Path, runs: Mapping[str, Sequence[str]]) -> dict[str, list[Trained]]:
    """Trains some runs, one after another, on the same two ranks.

    Args:
        folder: For what the runs write.
        runs: The overrides of the default configuration by the run's name.

    Returns:
        What each rank saw, by the run's name.
    """
    by_rank = run_ranks(RANKS, _train_all, str(folder), {name: list(overrides) for name, overrides in runs.items()})
    return {name: [seen[name] for seen in by_rank] for name in runs}


def inversions(ranks: Sequence[Trained]) -> dict[str, int]:
    """Adds up the inversions that the ranks received, by method."""
    total: Counter[str] = Counter()
    for rank in ranks:
        total.update(rank.counters["inversions"]["by_method"])
    return dict(total)


def _train_all(communicator: Communicator, folder: str, runs: Mapping[str, Sequence[str]]) -> dict[str, Trained]:
    return {name: _train_one(communicator, Path(folder) / name, name, overrides) for name, overrides in runs.items()}


def _train_one(communicator: Communicator, folder: Path, name: str, overrides: Sequence[str]) -> Trained:
    config = load_config(
        None, overrides=[*overrides, f"run.name={name}", f"run.dir={folder}", "checkpoint.period=0"], environment={}
    )
    device, before = torch.device("cpu"), storages()
    copies = Copies.one(communicator)
    costs = agree_on_costs(config, copies)
    materials = gather_materials(config, communicator.world_size, device, costs)
    training = make_training(config, communicator, materials, epoch=1, standing=Standing())
    store = CheckpointStore(folder / "checkpoints", copies, keep=1)
    log = MetricsLog(None)
    history = History(training, log)
    trainer = Trainer(training, Standing(), store=store, log=log, history=history, progress=Progress())
    try:
        assert trainer.run() == ""
        seen = _look(training, trainer, before)
        training.preconditioner.close()
    except BaseException:
        training.preconditioner.abandon()
        raise
    finally:
        training.reducer.close()
    return seen


def _look(training: Training, trainer: Trainer, before: dict[int, int]) -> Trained:
    preconditioner, accuracy = training.preconditioner, trainer.metrics["test_accuracy"]
    assert accuracy is not None
    return Trained(
        parameters=parameter_sha256(training.model.named_parameters()),
        accuracy=accuracy,
        counters=preconditioner.counters(),
        methods={block.name: group.inverter.name for group in preconditioner.groups for block in group.blocks},
        adopted={name: type(each) for name, each in preconditioner.inverses().items()},
        coverage=preconditioner.coverage().rows,
        held=held_since(before, training.data, preconditioner),
    )
