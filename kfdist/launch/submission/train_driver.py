"""The driver of a run's ranks: has Ray Train start a worker for each, and start all again when one is lost."""

import json
import os
import signal
import threading
import time
from contextlib import suppress
from typing import Any

from kfdist.config import Config, to_toml
from kfdist.errors import ConfigError, EnvironmentFault, ExitCode
from kfdist.launch.submission.request import Submission
from kfdist.launch.submission.room import check_room, rank_resources
from kfdist.launch.submission.storage import prepare_storage
from kfdist.launch.submission.train_worker import Board, RankOptions, run_rank
from kfdist.launch.terminal import summary_line
from kfdist.pool.ray_cluster import set_auth_mode
from kfdist.system.files import replace_file
from kfdist.system.run_summary import read_summary, unsaved

_ROOM_SECONDS = 60.0
_TICK_SECONDS = 0.2
_LOOK_SECONDS = 10.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_WORKER_VARIABLES = {
    # A rank sees the end of its worker by itself, and writes a checkpoint before its own; Ray would kill it at once.
    "RAY_kill_child_processes_on_worker_exit": "0",
}


def drive_ranks(config: Config, submission: Submission) -> int:
    """Trains a run by Ray Train; to be called in the main thread of a process of its own.

    Args:
        config: The configuration, with the addresses of a controller that serves.
        submission: The job's options.

    Returns:
        The exit code.

    Raises:
        ConfigError: The ranks refuse the configuration.
        EnvironmentFault: There is no room for the ranks, or they failed more often than allowed.
    """
    ray = _connect(config)
    asked = threading.Event()
    for number in _SIGNALS:
        signal.signal(number, lambda *_: asked.set())  # Ray has put its own there
    here = ray.get_runtime_context().get_node_id() if config.security.certificates is None else ""
    _wait_for_room(ray, config, submission, here, asked)
    mark = prepare_storage(submission.storage, config.run.name, asked)
    if asked.is_set():
        return ExitCode.RESUMABLE
    board = _board(ray)
    try:
        room = LostRoom(ray, config, submission.gpus_per_worker)
        result = _fit(ray, _trainer(config, submission, here, board, mark), board, asked, room)
    finally:
        with suppress(ray.exceptions.RayActorError):  # then what Ray Train gave up for says more
            if refusal := ray.get(board.refusal.remote()):
                raise ConfigError(refusal)
    return _conclude(config, result.return_value["summary"])


def _connect(config: Config) -> Any:
    """Connects to the cluster. Not before: Ray reads these variables when it is imported."""
    set_auth_mode()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # modules of the user's own are looked for in the working directory
    import ray

    try:
        ray.init(address=config.cluster.ray, namespace=f"kfdist-{config.run.name}")
    except Exception as error:  # Ray raises bare ones, too
        raise EnvironmentFault(f"the Ray at {config.cluster.ray} refuses the ranks' driver: {error}") from error
    return ray


def _board(ray: Any) -> Any:
    """Starts the board on this node, without which there is no run; Ray Train makes up for the loss of any other."""
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return ray.remote(num_cpus=0, label_selector=here)(Board).remote()


def _wait_for_room(ray: Any, config: Config, submission: Submission, here: str, asked: threading.Event) -> None:
    """Reserves what the ranks need, and lets go of it: Ray Train itself would wait for it for ever."""
    ranks = config.cluster.workers
    bundles = [rank_resources(config, submission.gpus_per_worker)] * ranks
    selectors = [{"ray.io/node-id": here}] * ranks if here else None
    group = ray.util.placement_group(bundles, strategy="PACK", bundle_label_selector=selectors)
    deadline = time.monotonic() + _ROOM_SECONDS
    try:
        while not group.wait(_TICK_SECONDS):
            if asked.is_set():
                return
            if time.monotonic() > deadline:
                raise EnvironmentFault(
                    f"{ranks} ranks with {bundles[0]} each found no room on the cluster within {_ROOM_SECONDS:g} s; "
                    f"free are {ray.available_resources()}: end what uses the rest, add nodes, or ask for fewer"
                )
    finally:
        ray.util.remove_placement_group(group)


def _trainer(config: Config, submission: Submission, here: str, board: Any, mark: str) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    options = RankOptions(config=to_toml(config), one_node=bool(here), gpus=submission.gpus_per_worker, mark=mark)
    return DataParallelTrainer(
        run_rank,
        train_loop_config={"options": options, "board": board},
        scaling_config=ScalingConfig(
            num_workers=config.cluster.workers,
            use_gpu=bool(submission.gpus_per_worker),
            resources_per_worker=rank_resources(config, submission.gpus_per_worker),
            label_selector={"ray.io/node-id": here} if here else None,
        ),
        run_config=RunConfig(
            name=config.run.name,
            storage_path=submission.storage,
            failure_config=FailureConfig(max_failures=submission.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.keep),
            worker_runtime_env={"env_vars": _WORKER_VARIABLES},
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _fit(ray: Any, trainer: Any, board: Any, asked: threading.Event, room: "LostRoom") -> Any:
    """Trains in another thread, passes a request to stop on to the ranks, and says what they wait for."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            results.append(trainer.fit())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=fit, name="kfdist-train", daemon=True)
    thread.start()
    threading.Thread(target=room.watch, args=[thread], name="kfdist-room", daemon=True).start()
    told = False
    while thread.is_alive():
        thread.join(_TICK_SECONDS)
        if asked.is_set() and not told:
            told = True
            ray.get(board.ask_stop.remote())
    if errors:
        raise _fault(errors[0]) from errors[0]
    return results[0]


class LostRoom:
    """Says that the cluster doesn't hold the run any more; Ray Train waits for room, for ever, without a word."""

    def __init__(self, ray: Any, config: Config, gpus_per_worker: int) -> None:
        self._ray = ray
        self._config = config
        self._gpus_per_worker = gpus_per_worker
        self._told = ""

    def watch(self, training: threading.Thread) -> None:
        """Looks now and then while Ray Train trains; in a thread of its own, since Ray may be long to answer."""
        while training.is_alive():
            self.look()
            training.join(_LOOK_SECONDS)

    def look(self) -> None:
        """Looks at the nodes, and tells what is new; nothing if Ray doesn't know, as while its head is restarted."""
        try:
            nodes = [node for node in self._ray.nodes() if node["Alive"]]
            here = self._ray.util.get_node_ip_address()
        except Exception:  # Ray raises bare ones, too; what has become of the run, Ray Train says
            return
        missing = ""
        try:
            check_room(nodes, here, self._config, self._gpus_per_worker)
        except EnvironmentFault as fault:
            missing = str(fault)
        if missing and missing != self._told:
            print(f"the cluster has lost nodes: {missing}. What was there waits until there is room", flush=True)
        self._told = missing


def _fault(error: BaseException) -> EnvironmentFault:
    failures = getattr(error, "worker_failures", {})
    told = [f"rank {rank}: {str(failure).strip()}" for rank, failure in sorted(failures.items())] or [str(error)]
    return EnvironmentFault("Ray Train gave up; " + "\n".join(told) + "\nsubmit again to resume")


def _conclude(config: Config, summary: dict[str, Any]) -> int:
    # Where nodes share no directory, the job's node has none of the run's files but logs.
    directory = config.run.directory
    if read_summary(directory) != summary:
        replace_file(directory / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    if summary.get("status") != "finished":
        print(f"{summary_line(summary)}; submit again to resume", flush=True)
    elif lost := unsaved(summary):
        raise EnvironmentFault(f"the run is finished, but {lost}: make room, and submit again")
    return ExitCode.DONE
