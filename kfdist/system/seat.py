"""Where a rank sits among the others, in torchrun's variables."""

import os
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Seat:
    """A rank's place.

    Attributes:
        rank: Its number.
        world_size: How many there are.
        local_rank: Its number on its node, which is also its GPU's among those that it sees.
        local_world_size: How many its node has.
        node: The node's number.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int

    def variables(self, host: str, port: int) -> dict[str, str]:
        """Returns the environment of a rank that joins the others in a store at `host:port`, held by its starter."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "GROUP_RANK": str(self.node),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }


def ranks_here() -> int:
    """Returns how many ranks a launcher or torchrun started on this machine, this one included; 1 without either."""
    return _count("LOCAL_WORLD_SIZE")


def ranks_by_environment() -> int:
    """Returns how many ranks train together as torchrun's variables have it; 1 without them."""
    return _count("WORLD_SIZE")


def _count(variable: str) -> int:
    said = os.environ.get(variable, "")
    return int(said) if said.isdecimal() and int(said) > 0 else 1
