"""Where ranks meet: the store that a launcher holds for them, so that no port is chosen before it is bound."""

import socket
from dataclasses import dataclass
from datetime import timedelta

from kfdist.torch_internals import TCPStore


@dataclass(frozen=True)
class Rendezvous:
    """A key-value store that ranks of this machine join through torchrun's variables.

    Without it the launcher would have to find a free port, let go of it, and hope that rank 0 gets it. Here the
    launcher binds port 0 itself, and torch's own switch for agents that hold the store makes every rank a client of
    it. The store lives as long as this object.

    Attributes:
        store: The store; its thread serves inside this process.
        world_size: How many ranks will join.
    """

    store: TCPStore
    world_size: int

    def variables(self, rank: int) -> dict[str, str]:
        """Returns the environment of one rank, the variables that torchrun would set for it on one machine."""
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }


def host_rendezvous(world_size: int) -> Rendezvous:
    """Starts a store on a free port of the loopback interface, for `world_size` ranks of this machine."""
    # Left to itself, the store would listen on every interface, and it asks nobody for a password.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        store = TCPStore(
            "127.0.0.1",
            listener.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=60),
            master_listen_fd=listener.detach(),
        )
    return Rendezvous(store=store, world_size=world_size)
