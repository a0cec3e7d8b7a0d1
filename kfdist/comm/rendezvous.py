"""Where ranks meet: the store that a launcher holds for them, so that no port is chosen before it is bound."""

import json
import os
import socket
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta

from kfdist.system.seat import Seat
from kfdist.torch_internals import PrefixStore, Store, TCPStore

_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Rendezvous:
    """A key-value store that ranks join through torchrun's variables.

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
        seat = Seat(rank=rank, world_size=self.world_size, local_rank=rank, local_world_size=self.world_size, node=0)
        return seat.variables("127.0.0.1", self.store.port)


def host_rendezvous(world_size: int, host: str = "127.0.0.1") -> Rendezvous:
    """Starts a store for `world_size` ranks, on a free port of the loopback interface or of another address."""
    # Left to itself, the store would listen on every interface, and it asks nobody for a password.
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        store = TCPStore(
            host,
            listener.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=60),
            master_listen_fd=listener.detach(),
        )
    return Rendezvous(store=store, world_size=world_size)


def torchruns_store(timeout_seconds: float) -> Store | None:
    """Returns what ranks under torchrun meet in, after a restart too; None without torchrun.

    torchrun's agents keep one store over restarts (torch 2.13), in which ranks would find the addresses of dead ones.
    So ranks first agree on a prefix that is new. Nothing in their variables would do: the count of restarts isn't the
    same on all nodes.

    Raises:
        TimeoutError: Not all ranks came.
        RuntimeError: The store can't be reached.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_seconds),
    )
    prefix = agree_on_prefix(PrefixStore("kfdist", store), rank, world_size, timeout_seconds=timeout_seconds)
    return PrefixStore(f"kfdist/{prefix}", store)


def agree_on_prefix(store: Store, rank: int, world_size: int, *, timeout_seconds: float) -> str:
    """Returns the same new name on all ranks that meet now, whatever earlier ranks left in the store.

    Rank 0 names a meeting, the others sign in under that name, and it confirms to each what it signed with. Whoever
    signed in to a meeting of the dead finds its own signature in no confirmation, and sees another name before long.

    Raises:
        TimeoutError: Not all ranks came.
    """
    deadline = time.monotonic() + timeout_seconds
    own = uuid.uuid4().hex
    missing = list(range(1, world_size)) if rank == 0 else []
    if rank == 0:
        store.set("meeting", own)
    signed = ""
    while time.monotonic() < deadline:
        if rank == 0:
            missing = [other for other in missing if not store.check([f"{own}/{other}"])]
            if not missing:
                signatures = [store.get(f"{own}/{other}").decode() for other in range(1, world_size)]
                store.set(f"{own}/confirmed", json.dumps(signatures))
                return own
        elif store.check(["meeting"]):
            meeting = store.get("meeting").decode()
            if meeting != signed:
                store.set(f"{meeting}/{rank}", own)
                signed = meeting
            if store.check([f"{meeting}/confirmed"]) and own in json.loads(store.get(f"{meeting}/confirmed")):
                return meeting
        time.sleep(_POLL_SECONDS)
    who = f"ranks {missing} didn't come" if missing else "rank 0 didn't come"
    raise TimeoutError(f"{who} within {timeout_seconds:g} s")
