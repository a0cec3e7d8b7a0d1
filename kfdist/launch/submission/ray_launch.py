"""A job on a Ray cluster: controller, pool and the driver of the ranks, as processes of a launch on the job's node."""

import os
import socket
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

from typing_extensions import override

from kfdist.config import Config
from kfdist.errors import ConfigError, EnvironmentFault, ExitCode
from kfdist.launch.launcher import SLOW_SECONDS, Launch, check_launch, say_slow, stopped_in_checks
from kfdist.launch.submission.request import Submission
from kfdist.launch.terminal import StopRequests, Terminal
from kfdist.system.addresses import address_towards, is_loopback, join_address, split_address
from kfdist.system.processes import Command
from kfdist.system.run_summary import read_summary
from kfdist.system.slowness import told_while_long
from kfdist.training.setup import check_controller

_TRAIN_NEEDS = ("pandas", "pyarrow", "fsspec", "requests")
"""What `import ray.train` asks for."""


def run_job(terminal: Terminal, requests: StopRequests) -> int:
    """Runs a submission in its job.

    Args:
        terminal: The job's log.
        requests: Counts the signals that ask to stop.

    Returns:
        The exit code: 0 finished, or stopped because somebody asked for it.

    Raises:
        ConfigError: A value is wrong; nothing was started.
        EnvironmentFault: The cluster isn't fit, or a process failed.
    """
    check_ray_train()
    submitted = Submission.of_this_job().configuration()
    own_controller = is_loopback(split_address(submitted.control.address)[0])
    config = on_cluster(submitted, os.environ.get("RAY_ADDRESS", ""))
    try:
        with requests.raising(), told_while_long(partial(say_slow, terminal, config), every_seconds=SLOW_SECONDS):
            finished = check_launch(config, own_controller=own_controller)
    except KeyboardInterrupt:
        return stopped_in_checks(config, terminal)
    except ConfigError as error:
        if not error.path.startswith("data.settings"):
            raise
        finished = ""  # the data may be on other nodes only: the ranks will find out
    if finished:
        terminal.say(finished)
        terminal.result(read_summary(config.run.directory))
        return ExitCode.DONE
    launch = RayLaunch(config, terminal, requests)
    launch.own_controller = own_controller
    return launch.run()


def check_ray_train() -> None:
    """Checks that Ray Train could be imported.

    Raises:
        EnvironmentFault: It lacks what the extra brings.
    """
    if missing := [name for name in _TRAIN_NEEDS if find_spec(name) is None]:
        raise EnvironmentFault(
            f"Ray Train needs {', '.join(missing)}, which {socket.gethostname()} doesn't have; install the extra on "
            "every node: pip install 'kfdist[submit]'"
        )


def on_cluster(config: Config, ray_address: str) -> Config:
    """Returns a configuration as it holds in a job: its Ray is the cluster, its controller where all nodes reach it.

    Args:
        config: As submitted.
        ray_address: The cluster's, as Ray tells its jobs.

    Raises:
        EnvironmentFault: There is none.
    """
    try:
        host, port = split_address(ray_address)
    except ValueError:
        raise EnvironmentFault(
            f"RAY_ADDRESS is {ray_address!r}, no address of a cluster; start this with `kfdist submit`"
        ) from None
    cluster: dict[str, str] = {"ray": ray_address}
    control: dict[str, str] = {}
    if config.security.certificates is not None:
        cluster["owner_address"] = "node"
        here = address_towards(host, port)
        for field in ("address", "metrics_address"):
            listens, its_port = split_address(getattr(config.control, field))
            if is_loopback(listens):
                control[field] = join_address(here, its_port)
    return config.model_copy(
        update={
            "cluster": config.cluster.model_copy(update=cluster),
            "control": config.control.model_copy(update=control),
        }
    )


class RayLaunch(Launch):
    """A launch whose ranks are Ray Train's; one process drives them and stands for all of them.

    Attributes:
        own_controller: Whether it starts a controller; it finds one where control.address isn't on loopback.
    """

    # Ray decides how long a job may take to stop (RAY_JOB_STOP_WAIT_TIME_S on the head, 3 s unless set).
    stop_ranks_seconds = 3600.0
    own_controller = True

    @override
    def _start_controller(self) -> None:
        if self.own_controller:
            super()._start_controller()
            return
        check_controller(self._config)
        self._terminal.say(f"controller on {self._config.control.address}, which was there already")

    @override
    def _trains_elsewhere(self) -> bool:
        # Where nodes share no directory, this one has logs and the summary only, and after a failure not even that.
        return any(driver.poll() != ExitCode.BAD_INPUT for driver in self._ranks)

    @override
    def _rank_commands(self) -> Iterator[Command]:
        yield self._command("ranks", "ray-ranks", tells_user=True)
