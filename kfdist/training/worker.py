"""A training rank from its start to its end: what `kfdist worker` does."""

import hashlib
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from types import FrameType

import torch

from kfdist.comm.communicator import Communicator, join_training_group
from kfdist.comm.together import require_equal
from kfdist.config import Config, to_toml
from kfdist.config.service_sections import SecuritySection
from kfdist.errors import ConfigError, EnvironmentFault, ExitCode, KfdistError
from kfdist.policies import tuning
from kfdist.system.credentials import Role
from kfdist.system.provenance import hardware, versions
from kfdist.system.run_notices import RunNotice, place_of, posted
from kfdist.system.slowness import told_while_long
from kfdist.training.checkpoint import CheckpointStore, Loaded
from kfdist.training.copies import Copies
from kfdist.training.elastic_agent import check_nodes
from kfdist.training.history import History
from kfdist.training.method import agree_on_costs
from kfdist.training.progress import Progress
from kfdist.training.reporting import MetricsLog, make_progress
from kfdist.training.run_directory import RunDirectory, inspect_run
from kfdist.training.run_state import Materials, Standing, Training, restore_state, standing_of
from kfdist.training.setup import (
    check_controller,
    choose_device,
    device_name,
    gather_materials,
    make_training,
)
from kfdist.training.summary import summarise, write_summary
from kfdist.training.trackers.choosing import make_trackers
from kfdist.training.trackers.tracker import TrackerFeed
from kfdist.training.trainer import Trainer

_LOG = logging.getLogger(__name__)

_SLOW_SECONDS = 20.0
"""How long a rank may prepare without a word, and then between two; it doesn't need as long where disks answer."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a rank ended.

    Attributes:
        code: The exit code: 0 finished, or stopped where torchrun would restart; 75 stopped and resumable.
        message: What to tell the user; empty on ranks other than 0, and where the summary says it all.
    """

    code: ExitCode
    message: str = ""


def run_worker(config: Config) -> Ending:
    """Runs this rank of a run; torchrun's variables say which one it is.

    Raises:
        ConfigError: A value is wrong. Nothing has been made.
        EnvironmentFault: The machine isn't fit: no controller, a directory in use, ...
        LossNotFinite: Training diverged.
    """
    # Counts of threads are part of a run's numbers; without this they would be whatever the launcher set.
    torch.set_num_threads(config.cluster.threads)
    device = choose_device(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    check_nodes()
    check_controller(config)
    communicator = join_training_group(timeout_seconds=config.cluster.group_timeout_seconds, device=device.type)
    try:
        return train_together(config, communicator, device)
    finally:
        communicator.close()


def train_together(config: Config, communicator: Communicator, device: torch.device) -> Ending:
    """Runs a run on ranks that have met; all of them must call it.

    Raises:
        ConfigError, EnvironmentFault, LossNotFinite: As for `run_worker`.
    """
    _check_same_configuration(config, communicator)
    copies = Copies.by_node(communicator, config.run.directory)
    finished = next(filter(None, copies.on_leaders(lambda: inspect_run(config)).values()), "")

    def say_slow(seconds: float) -> None:
        text = "rank %d prepares for %.0f s: the data (%s) is listed, the model built, and both are tried"
        _LOG.warning(text, communicator.rank, seconds, config.data.name)

    with told_while_long(say_slow, every_seconds=_SLOW_SECONDS):
        materials = gather_materials(config, communicator.world_size, device, agree_on_costs(config, copies))
    if finished:
        return Ending(code=ExitCode.DONE, message=finished if communicator.rank == 0 else "")
    return _Start(config, copies.probed(config.run.directory), materials).run()


def _check_same_configuration(config: Config, communicator: Communicator) -> None:
    # First, as what two versions make of one file may differ, too.
    require_equal(
        communicator,
        {"kfdist": versions().get("kfdist")},
        lambda _, listed: EnvironmentFault(
            f"the ranks have different versions of kfdist ({listed}); install the same one on all machines"
        ),
    )
    require_equal(
        communicator,
        {"configuration": configuration_digest(config)},
        lambda _, listed: ConfigError(
            f"the ranks were started with different configurations (by SHA-256, {listed}); give all ranks the same "
            "file, --set and KFDIST_* variables"
        ),
    )


def configuration_digest(config: Config) -> str:
    """Returns what must be the same on all ranks, shortened: all but where each finds its certificates."""
    common = config.model_copy(update={"security": SecuritySection()})
    return hashlib.sha256(to_toml(common).encode()).hexdigest()[:16]


class _Start:
    """One start of a run on one rank, once nothing is wrong with its configuration."""

    def __init__(self, config: Config, copies: Copies, materials: Materials) -> None:
        self._config = config
        self._copies = copies
        self._communicator = copies.communicator
        self._materials = materials
        self._directory: RunDirectory | None = None
        self._trackers: TrackerFeed | None = None
        self._trained = False
        self._ended = "failed"

    def run(self) -> Ending:
        try:
            # Higher than in any copy: rank 0 may be on a node that is new to the run.
            epoch = max(self._copies.on_leaders(self._open_directory).values()) + 1
            self._copies.on_leaders(lambda: self._begin(epoch))
            with self._announced():
                return self._train(epoch)
        except BaseException as error:
            self._clean_up_after(error)
            raise
        finally:
            # After all that must be written: a server that can't be reached holds this up until the rank is killed.
            if self._trackers is not None:
                self._trackers.close(self._ended)
            if self._directory is not None:
                self._directory.close()

    def _open_directory(self) -> int:
        self._directory = RunDirectory.open(self._config)
        return self._directory.last_epoch

    def _begin(self, epoch: int) -> None:
        assert self._directory is not None
        self._directory.begin(epoch, self._config, self._materials.plan.costs)

    def _take_over(self) -> None:
        assert self._directory is not None
        self._directory.take_over(self._config)

    def _announced(self) -> AbstractContextManager[None]:
        """Lets `kfdist status` on this machine find the run, also where its controller is elsewhere or missing."""
        if self._communicator.rank != 0:
            return nullcontext()
        config, directory = self._config, self._config.run.directory.absolute()
        credentials = config.security.credentials(Role.CLIENT)
        notice = RunNotice(
            pid=os.getpid(),
            run=config.run.name,
            directory=str(directory),
            place=place_of(directory),
            address=config.control.address if config.cluster.link == "service" else "",
            certificates=credentials.certificates if credentials is not None else "",
            token_file=credentials.token_file if credentials is not None else "",
        )
        return posted(notice)

    def _clean_up_after(self, error: BaseException) -> None:
        if self._directory is None:
            return
        if not self._trained:
            self._directory.abandon()
        elif isinstance(error, Exception):
            message = str(error) if isinstance(error, KfdistError) else f"{type(error).__name__}: {error}"
            with suppress(OSError, EnvironmentFault):  # the first error is the one to tell
                self._check_current()
                write_summary(
                    self._directory.path,
                    {"status": "failed", "run": self._config.run.name, "error": message, "versions": versions()},
                )

    def _check_current(self) -> None:
        if self._directory is not None:
            self._directory.check_current()

    def _train(self, epoch: int) -> Ending:
        config, communicator = self._config, self._communicator
        store = CheckpointStore(
            config.run.directory / "checkpoints",
            self._copies,
            keep=config.checkpoint.keep,
            check_start=self._check_current,
        )
        newest = store.newest()
        loaded = store.load(newest) if newest is not None else None
        standing = standing_of(loaded) if loaded is not None else Standing()
        training = make_training(config, communicator, self._materials, epoch=epoch, standing=standing)
        try:
            return self._train_with(training, store, loaded, epoch)
        except BaseException:
            training.preconditioner.abandon()
            raise
        finally:
            training.reducer.close()
            training.feed.close()

    def _train_with(self, training: Training, store: CheckpointStore, loaded: Loaded | None, epoch: int) -> Ending:
        config, communicator = self._config, self._communicator
        standing = standing_of(loaded) if loaded is not None else Standing()
        total_steps = training.learning_rate.total_steps
        path = self._directory.path if self._directory is not None else None
        self._trackers = make_trackers(config if communicator.rank == 0 else None, standing)
        with (
            closing(make_progress(worker_rank=communicator.rank, total_steps=total_steps)) as progress,
            closing(MetricsLog(path, tell=self._trackers.tell)) as log,
            closing(MetricsLog(path, "history.jsonl")) as details,
        ):
            history = History(training, details)
            if loaded is not None:
                restore_state(training, loaded)
            self._copies.on_leaders(self._take_over)
            _announce(training, standing, progress, store.remarks)
            log.write(
                "start",
                start=epoch,
                step=standing.step,
                world_size=communicator.world_size,
                versions=versions(),
                hardware={**hardware(), "device of rank 0": device_name(training.device)},
            )
            history.start(epoch, standing.step)
            if self._directory is not None:
                write_summary(self._directory.path, {"status": "running", "run": config.run.name, "start": epoch})
            trainer = Trainer(training, standing, store=store, log=log, history=history, progress=progress)
            try:
                with _stopping_on_signals(training):
                    stopped = trainer.run()
            finally:
                self._trained = trainer.standing.step > 0 or loaded is not None
            summary = summarise(training, trainer, start=epoch, stopped=stopped)
            log.write("end", step=trainer.standing.step, status=summary["status"])
            # Before the farewell, which waits for the controller: a rank that is killed meanwhile has done its work.
            if self._directory is not None:
                write_summary(self._directory.path, summary)
            self._ended = summary["status"]
            training.preconditioner.beat(summary["status"])
            training.preconditioner.close()
        if not stopped:
            return Ending(code=ExitCode.DONE)
        message = f"stopped at step {trainer.standing.step}: {stopped}; start the run again to resume"
        # torchrun starts ranks again that end with any other code, and so would undo the stop.
        code = ExitCode.DONE if trainer.asked_to_stop and restarts_left() else ExitCode.RESUMABLE
        return Ending(code=code, message=message if communicator.rank == 0 else "")


def restarts_left() -> bool:
    """Tells whether torchrun would start this rank again if it failed (`--max-restarts`)."""
    done, most = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return done < most


def _announce(training: Training, standing: Standing, progress: Progress, remarks: list[str]) -> None:
    for message in remarks:
        progress.say(message)
    config, ranks = training.config, training.communicator.world_size
    where = f"resumed at step {standing.step}" if standing.step else "training"
    progress.say(
        f"{where} on {ranks} rank{'s' if ranks > 1 else ''} ({training.device.type}): {config.model.name} on "
        f"{config.data.name}, {config.optimizer.name} with {config.preconditioner.described}, "
        f"{training.learning_rate.total_steps} steps of {ranks} x {config.data.batch_size} examples"
    )
    in_force = training.preconditioner.pipeline.in_force
    if in_force.changes:
        progress.say(tuning.kept(config.run.name, in_force.changes))
    if (given := config.preconditioner.damping_given) and (why := in_force.without_effect("damping")):
        progress.say(f"{given} does nothing here: {why}")


@contextmanager
def _stopping_on_signals(training: Training) -> Iterator[None]:
    """Turns SIGINT and SIGTERM into a request to stop, which all ranks obey at the same step.

    However often they come: a terminal's Ctrl-C, torchrun and the launcher all send them, and the checkpoint must be
    written all the same. Who can't wait sends SIGKILL.
    """

    def ask(number: int, frame: FrameType | None) -> None:
        del number, frame
        training.preconditioner.request_stop()

    former = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
