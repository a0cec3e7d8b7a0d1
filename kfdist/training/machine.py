"""What a run needs of the machine it is on: its device, its controller, its ports."""

import os
import socket

import torch

from kfdist.config import Config
from kfdist.errors import EnvironmentFault
from kfdist.system.addresses import server_address

_CONNECT_SECONDS = 5.0


def choose_device(config: Config) -> torch.device:
    """Returns the device of this rank: one GPU per rank of a machine, or the CPU.

    Raises:
        EnvironmentFault: CUDA is asked for and isn't there.
    """
    wanted = config.run.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise EnvironmentFault(
            f'run.device is "{wanted}" and this is rank {local_rank} of its machine, which has '
            f'{torch.cuda.device_count()} CUDA devices; start fewer ranks, or set run.device = "cpu"'
        )
    return torch.device("cuda", local_rank)


def check_controller(config: Config) -> None:
    """Checks that a server listens at the controller's address, before anything is started.

    A plain connection: ranks don't speak gRPC, their couriers do.

    Raises:
        ConfigError: The address has port 0, which only a server can take.
        EnvironmentFault: Nobody is there.
    """
    if config.cluster.link != "service":
        return
    address = config.control.address
    reached = server_address(address, field="control.address")
    try:
        socket.create_connection(reached, timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise EnvironmentFault(
            f"no controller at {address} ({error}); start `kfdist serve` first, or give its address with "
            "--controller HOST:PORT"
        ) from None
