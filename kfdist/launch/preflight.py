"""What a launcher checks before it starts anything: every mistake that can be seen from here."""

import socket

import torch

from kfdist.config import Config
from kfdist.errors import EnvironmentFault
from kfdist.system.addresses import split_address
from kfdist.training.run_directory import RunStatus, inspect_run
from kfdist.training.setup import gather_materials


def preflight(config: Config) -> RunStatus:
    """Checks that the run can be started: its directory, data, model, inverter and ports. Changes nothing.

    Returns:
        What is in the run directory; there may be nothing left to train.

    Raises:
        ConfigError: A value is wrong.
        EnvironmentFault: The run directory is in use, or a port is.
    """
    status = inspect_run(config)
    # The device a rank will use is its own to find; everything else is the same on the CPU.
    gather_materials(config, config.cluster.workers, torch.device("cpu"))
    if config.cluster.link == "service":
        check_port("control.address", config.control.address)
        check_port("control.metrics_address", config.control.metrics_address)
    return status


def check_port(path: str, address: str) -> None:
    """Checks that an address can be bound; port 0 always can.

    Args:
        path: The configuration's field, for the message.
        address: `host:port`.

    Raises:
        EnvironmentFault: It can't.
    """
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # Not SO_REUSEPORT, which would let two controllers share a port without noticing.
        with socket.create_server((host, port), family=family):
            pass
    except OSError as error:
        raise EnvironmentFault(
            f"{path}: {address} can't be bound ({error.strerror}); stop whoever uses it, choose another port, or let "
            f"the system choose one with --set {path}={host}:0"
        ) from None
