"""Where owners are placed: on this machine's Ray node, or spread over the nodes of a cluster."""

import importlib
import os
import signal
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

from typing_extensions import override

from kfdist.config import Config
from kfdist.errors import EnvironmentFault
from kfdist.owner.owner import Owner, OwnerOptions
from kfdist.pool.ray_cluster import LOCAL
from kfdist.system.processes import command_line

_ROOM_SECONDS = 20.0
"""How long nodes that are just joining may take to make room."""

_TITLE = b"ray::Owner"
"""What Ray calls an owner's process, and an `OwnerOnNode`'s."""


class Placement(Protocol):
    """Says where owners are, and reaches their processes there.

    Attributes:
        owner: The actors' class.
        host: Where owners listen; an `OwnerOnNode` finds it out by itself.
        remembers: Whether their nodes have the pool's directory, where they remember their ports.
    """

    owner: type[Owner]
    host: str
    remembers: bool

    def options(self, index: int) -> dict[str, Any]:
        """Returns the options by which Ray places an owner."""
        ...

    def kill(self, pid: int, node: str) -> None:
        """Ends an owner's process with SIGKILL, which also ends a stopped one."""
        ...


def place(ray: Any, config: Config) -> Placement:
    """Finds room for a run's owners.

    Raises:
        EnvironmentFault: There is none, for which Ray would wait silently for ever.
    """
    if config.cluster.ray == LOCAL or config.cluster.owner_address != "node":
        return OnThisNode(ray, config)
    return OverNodes(ray, config)


class OnThisNode(Placement):
    """All owners on this machine's Ray node, where the others of the run are."""

    owner = Owner
    remembers = True

    def __init__(self, ray: Any, config: Config) -> None:
        owners = config.cluster.owners
        here = ray.get_runtime_context().get_node_id()
        node = next(node for node in ray.nodes() if node["NodeID"] == here)
        cpus = int(node["Resources"].get("CPU", 0))
        if cpus < owners:
            raise EnvironmentFault(
                f"cluster.owners = {owners} needs as many CPUs of this machine's Ray node, which has {cpus}; "
                f"start Ray with --num-cpus {owners}, or ask for fewer owners"
            )
        self.host = node["NodeManagerAddress"] if config.cluster.owner_address == "node" else "127.0.0.1"
        self._strategy = _strategies().NodeAffinitySchedulingStrategy(node_id=here, soft=False)

    @override
    def options(self, index: int) -> dict[str, Any]:
        del index
        return {"num_cpus": 1, "scheduling_strategy": self._strategy}

    @override
    def kill(self, pid: int, node: str) -> None:
        del node
        end_owner(pid)


class OverNodes(Placement):
    """Each owner in a bundle of one placement group, which Ray moves to another node when its node dies."""

    owner: type[Owner]
    host = ""
    remembers = False

    def __init__(self, ray: Any, config: Config) -> None:
        cluster = config.cluster
        self.owner = OwnerOnNode
        self._ray = ray
        util = importlib.import_module("ray.util")
        self._group = util.placement_group([{"CPU": 1}] * cluster.owners, strategy=cluster.owner_strategy)
        if not self._group.wait(_ROOM_SECONDS):
            util.remove_placement_group(self._group)
            cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
            raise EnvironmentFault(
                f'cluster.owners = {cluster.owners} with cluster.owner_strategy = "{cluster.owner_strategy}" finds no '
                f"room: each needs a CPU, and Ray's nodes have {cpus}, some of which others may use; add nodes, or ask "
                "for fewer owners"
            )

    @override
    def options(self, index: int) -> dict[str, Any]:
        strategy = _strategies().PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        return {"num_cpus": 1, "scheduling_strategy": strategy}

    @override
    def kill(self, pid: int, node: str) -> None:
        if not node:
            return  # Ray has said nothing of it yet, and hears of its end by itself
        there = _strategies().NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        self._ray.remote(end_owner).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(pid)


class OwnerOnNode(Owner):
    """An owner that listens on the address of the Ray node where it is, after each start of whichever that is."""

    def __init__(self, options: OwnerOptions) -> None:
        util = importlib.import_module("ray.util")
        super().__init__(replace(options, host=util.get_node_ip_address()))

    @override
    def status(self, seconds: float = 5.0) -> dict[str, Any]:
        node = importlib.import_module("ray").get_runtime_context().get_node_id()
        return {**super().status(seconds), "node": node}


def end_owner(pid: int) -> None:
    """Ends an owner's process on this machine with SIGKILL, unless the number belongs to another one by now."""
    if command_line(pid).startswith(_TITLE):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _strategies() -> Any:
    return importlib.import_module("ray.util.scheduling_strategies")
