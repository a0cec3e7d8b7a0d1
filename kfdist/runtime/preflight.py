"""What a launcher checks before it starts anything: every mistake that can be seen from here."""

import socket

from kfdist.config import Config
from kfdist.config.fields import split_address
from kfdist.curvature.inverters import make_inverter
from kfdist.data import load_data
from kfdist.data.sampler import Sampler
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.models import build_model
from kfdist.runtime.groups import plan_blocks
from kfdist.runtime.rundir import RunStatus, inspect_run


def preflight(config: Config) -> RunStatus:
    """Checks that the run can be started: its directory, data, model, inverter and ports. Changes nothing.

    Returns:
        What is in the run directory; there may be nothing left to train.

    Raises:
        ConfigError: A value is wrong.
        EnvironmentFault: The run directory is in use, or a port is.
    """
    status = inspect_run(config)
    data = load_data(config.data.name, config.data.settings)
    Sampler(
        examples=len(data.train),
        batch_size=config.data.batch_size,
        world_size=config.cluster.workers,
        seed=config.run.seed,
    )
    model = build_model(
        config.model.name,
        config.model.settings,
        example_shape=data.example_shape,
        classes=data.classes,
        seed=config.run.seed,
    )
    method = config.preconditioner
    try:
        inverter = make_inverter(method.method, **method.settings)
    except ConfigError as error:
        raise ConfigError(str(error), path="preconditioner") from None
    plan_blocks(model, inverter, skip=method.skip, world_size=config.cluster.workers)
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
