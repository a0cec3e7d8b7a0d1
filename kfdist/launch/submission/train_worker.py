"""What a worker of Ray Train does: it starts a rank as its child, watches it, and reports its checkpoints.

The rank knows nothing of Ray. It ends when this process does, however that ends (`kfdist.system.lifetime`).
"""

import os
import shutil
import signal
import socket
import time
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfdist.config import Config, config_from_table
from kfdist.errors import ConfigError, EnvironmentFault, KfdistError
from kfdist.launch.outcome import child_fault
from kfdist.launch.submission.train_checkpoints import Held, TrainCheckpoints
from kfdist.system.addresses import interface_of
from kfdist.system.files import lock_holder
from kfdist.system.lifetime import PARENT_VARIABLE
from kfdist.system.processes import Child, Command
from kfdist.system.run_summary import read_summary
from kfdist.system.seat import Seat
from kfdist.system.spawn import inherited_environment, module_command

_TICK_SECONDS = 1.0
_LAST_SECONDS = 0.1
_LOCK_SECONDS = 30.0
"""How long a start waits for the ranks of the one before, which may be writing a last checkpoint."""


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """What workers are told.

    Attributes:
        config: The configuration, as TOML.
        one_node: Whether all ranks are on one node, so that loopback will do.
        gpus: GPUs of each rank.
        mark: A file in Ray Train's storage; empty where that is a URI.
    """

    config: str
    one_node: bool
    gpus: int
    mark: str


class Board:
    """An actor for the few words between the driver and the workers."""

    def __init__(self) -> None:
        self._stop = False
        self._refusal = ""

    def ask_stop(self) -> None:
        """Asks the ranks to write a checkpoint and end."""
        self._stop = True

    def stop_asked(self) -> bool:
        """Says whether somebody asked for that."""
        return self._stop

    def refuse(self, reason: str) -> None:
        """Says that the configuration is wrong, which no new start would mend; the first reason counts."""
        self._refusal = self._refusal or reason

    def refusal(self) -> str:
        """Returns the reason; empty if there is none."""
        return self._refusal


def run_rank(given: dict[str, Any]) -> dict[str, Any]:
    """Runs a rank from its start to its end; Ray Train calls it in each worker.

    Returns:
        The run's summary, from the worker of rank 0.

    Raises:
        KfdistError: The rank failed, upon which Ray Train starts all ranks again.
    """
    import ray
    from ray import train
    from ray.train.collective import broadcast_from_rank_zero

    options, board, context = given["options"], given["board"], train.get_context()
    if ray.get(board.refusal.remote()):
        return {"summary": {}}
    config = config_from_table(tomllib.loads(options.config))
    rank = context.get_world_rank()
    checkpoints = None
    meeting: Any = None
    if rank == 0:
        wait_for_lock(config.run.directory)
        checkpoints = TrainCheckpoints(config, options.mark)
        checkpoints.restore(train.get_checkpoint())
        # Only here: torch takes seconds to import, and nothing else in a worker needs it.
        from kfdist.comm.rendezvous import host_rendezvous

        host = "127.0.0.1" if options.one_node else ray.util.get_node_ip_address()
        rendezvous = host_rendezvous(context.get_world_size(), host)
        meeting = {"host": host, "port": rendezvous.store.port}
    meeting = broadcast_from_rank_zero(meeting)
    seat = Seat(
        rank=rank,
        world_size=context.get_world_size(),
        # Ray shows each worker its own GPUs alone.
        local_rank=0 if options.gpus else context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
        node=context.get_node_rank(),
    )
    interface = "lo" if options.one_node else interface_of(ray.util.get_node_ip_address())
    child = Child(_command(config, options, seat, meeting, interface))
    _watch(child, board, checkpoints)
    return {"summary": read_summary(config.run.directory) if rank == 0 else {}}


def wait_for_lock(directory: Path, seconds: float = _LOCK_SECONDS) -> None:
    """Waits until nobody holds a run directory, as the ranks of a lost start do while they end.

    The ranks will look again, and say who holds it; so this raises nothing.
    """
    deadline = time.monotonic() + seconds
    while lock_holder(directory / "lock") is not None and time.monotonic() < deadline:
        time.sleep(0.2)


def _command(config: Config, options: RankOptions, seat: Seat, meeting: dict[str, Any], interface: str) -> Command:
    directory = config.run.directory / "logs"
    file = directory / f"rank-{seat.rank}.toml"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file.write_text(options.config, encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(
            f"can't write to {directory} on {socket.gethostname()} ({error.strerror}); choose another run.dir"
        ) from error
    security = {name: value for name, value in os.environ.items() if name.startswith("KFDIST_SECURITY__")}
    interfaces = {} if not interface else dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), interface)
    return Command(
        name=f"rank {seat.rank}",
        line=module_command("kfdist", "worker", str(file)),
        environment={
            **interfaces,
            **inherited_environment(os.environ),
            **security,  # where certificates are is each node's own business
            **seat.variables(meeting["host"], meeting["port"]),
            # A stop that was asked for ends ranks with 0 then, as under torchrun: a failure would undo it.
            "TORCHELASTIC_MAX_RESTARTS": "1",
            "OMP_NUM_THREADS": str(config.cluster.threads),
            PARENT_VARIABLE: str(os.getpid()),
            "PYTHONUNBUFFERED": "1",
        },
        log=directory / f"rank-{seat.rank}.log",
        terminal=1 if seat.rank == 0 else None,
    )


def _watch(child: Child, board: Any, checkpoints: TrainCheckpoints | None) -> None:
    """Watches a rank to its end. All workers take every turn together, as Ray Train's reports are collectives."""
    import ray
    from ray import train
    from ray.train.collective import broadcast_from_rank_zero
    from ray.train.v2.api.report_config import CheckpointUploadMode

    told = False
    while True:
        if code := child.poll():
            raise _fault(child, code, board)
        kept: tuple[Any, dict[str, Any]] | None = None
        turn: Any = None
        if checkpoints is not None:
            if not told and ray.get(board.stop_asked.remote()):
                told = True
                child.signal(signal.SIGTERM)
            kept = _keep(checkpoints.next())
            turn = {"report": kept is not None, "over": code == 0}
        turn = broadcast_from_rank_zero(turn)
        if turn["report"]:
            checkpoint, metrics = kept or (None, {})
            train.report(metrics, checkpoint=checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)
        elif turn["over"]:
            break
        else:
            time.sleep(_TICK_SECONDS)
    while (code := child.poll()) is None:
        time.sleep(_LAST_SECONDS)
    if code:
        raise _fault(child, code, board)


def _keep(held: Held | None) -> tuple[Any, dict[str, Any]] | None:
    """Copies a checkpoint to Ray Train's storage; returns it, to be reported, with what to say of it.

    Not by `train.report` itself: what fails is the copy, and neither the run nor the others' report.
    """
    from ray import train

    if held is None:
        return None
    storage: Any = train.get_context().get_storage()
    try:
        local = train.Checkpoint.from_directory(str(held.directory))
        return storage.persist_current_checkpoint(local, held.name), held.metrics
    except Exception as error:  # of whichever file system this is
        print(f"Ray Train's storage can't be given {held.name} ({error}); the run goes on", flush=True)
        with suppress(Exception):
            storage.storage_filesystem.delete_dir(storage.build_checkpoint_path_from_name(held.name))
        return None
    finally:
        shutil.rmtree(held.directory, ignore_errors=True)


def _fault(child: Child, code: int, board: Any) -> KfdistError:
    import ray

    fault = child_fault(child, code, f"while training on {socket.gethostname()}")
    if isinstance(fault, ConfigError):
        ray.get(board.refuse.remote(str(fault)))
    else:
        print(fault, flush=True)  # into the job's log; Ray Train tells its own
    return fault
