"""Where owners are placed: on this machine's Ray node, or spread over the nodes of a cluster."""

import importlib
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

from typing_extensions import override

from kfdist.config import ClusterSection, Config, SecuritySection, security_from_environment
from kfdist.errors import EnvironmentFault
from kfdist.owner.owner import Owner, OwnerOptions
from kfdist.pool.bundles import actor_options, needs, resources_of, shortage
from kfdist.pool.ray_cluster import LOCAL
from kfdist.system.credentials import Role
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
    """All owners on this machine's Ray node, where the others of the run are; on others' Ray, in a placement group."""

    owner = Owner
    remembers = True

    def __init__(self, ray: Any, config: Config) -> None:
        cluster = config.cluster
        here = ray.get_runtime_context().get_node_id()
        node = next(node for node in ray.nodes() if node["NodeID"] == here)
        if missing := shortage(cluster, [node], strategy="STRICT_PACK"):
            more = "name a cluster that has it in cluster.ray" if cluster.ray == LOCAL else "start Ray with more"
            raise EnvironmentFault(
                f"cluster.owners = {cluster.owners} can't be placed on this machine's Ray node: {missing}; {more}, "
                "ask for fewer owners, or for less for each (cluster.bundle)"
            )
        self._options = actor_options(cluster)
        self.host = node["NodeManagerAddress"] if config.cluster.owner_address == "node" else "127.0.0.1"
        self._strategy = _strategies().NodeAffinitySchedulingStrategy(node_id=here, soft=False)
        self._group = None if cluster.ray == LOCAL else self._reserve(config, here)

    @override
    def options(self, index: int) -> dict[str, Any]:
        strategy = self._strategy if self._group is None else _in_bundle(self._group, index)
        return {**self._options, "scheduling_strategy": strategy}

    def _reserve(self, config: Config, here: str) -> Any:
        """Takes room that others may want, too, for all owners at once; an actor without any would wait silently."""
        cluster = config.cluster
        group = _placement_group(
            cluster,
            {**cluster.bundle.labels, "ray.io/node-id": here},
            strategy="STRICT_PACK",
            asked=f"cluster.owners = {cluster.owners} on this machine's Ray node",
        )
        if not group.wait(_ROOM_SECONDS):
            importlib.import_module("ray.util").remove_placement_group(group)
            raise EnvironmentFault(
                f"cluster.owners = {cluster.owners} find no room on this machine's Ray node: {needs(cluster)}, which "
                "it has, but others use it; `ray status` shows how much; end what uses it, or ask for fewer owners"
            )
        return group

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
        self._options = actor_options(cluster)
        asked = f'cluster.owners = {cluster.owners} with cluster.owner_strategy = "{cluster.owner_strategy}"'
        self._group = _placement_group(cluster, cluster.bundle.labels, strategy=cluster.owner_strategy, asked=asked)
        if not self._group.wait(_ROOM_SECONDS):
            importlib.import_module("ray.util").remove_placement_group(self._group)
            nodes = [node for node in ray.nodes() if node["Alive"]]
            if missing := shortage(cluster, nodes, strategy=cluster.owner_strategy):
                advice = "add nodes, ask for fewer owners, or for less for each (cluster.bundle)"
                raise EnvironmentFault(f"{asked} can't be placed: {missing}; {advice}")
            raise EnvironmentFault(
                f"{asked} finds no room: {needs(cluster)}, which Ray's {len(nodes)} nodes have, but others use it; "
                "`ray status` shows how much; end what uses it, or ask for fewer owners"
            )

    @override
    def options(self, index: int) -> dict[str, Any]:
        return {**self._options, "scheduling_strategy": _in_bundle(self._group, index)}

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
        # As for ranks and jobs: where certificates are, each node's own environment says.
        given = options.credentials
        pools = given and SecuritySection(certificates=given.certificates, token_file=given.token_file)
        credentials = security_from_environment(otherwise=pools).credentials(Role.OWNER)
        super().__init__(replace(options, host=util.get_node_ip_address(), credentials=credentials))

    @override
    def status(self, seconds: float = 5.0) -> dict[str, Any]:
        node = importlib.import_module("ray").get_runtime_context().get_node_id()
        return {**super().status(seconds), "node": node}


def end_owner(pid: int) -> None:
    """Ends an owner's process on this machine with SIGKILL, unless the number belongs to another one by now."""
    if command_line(pid).startswith(_TITLE):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _placement_group(cluster: ClusterSection, labels: Mapping[str, str], *, strategy: str, asked: str) -> Any:
    """Asks Ray for a bundle for each owner, on nodes with these labels."""
    selectors = {"bundle_label_selector": [dict(labels)] * cluster.owners} if labels else {}
    bundles = [resources_of(cluster)] * cluster.owners
    try:
        return importlib.import_module("ray.util").placement_group(bundles, strategy=strategy, **selectors)
    except ValueError as error:
        raise EnvironmentFault(f"{asked}: Ray refuses cluster.bundle, {needs(cluster)}: {error}") from error


def _in_bundle(group: Any, index: int) -> Any:
    return _strategies().PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)


def _strategies() -> Any:
    return importlib.import_module("ray.util.scheduling_strategies")
