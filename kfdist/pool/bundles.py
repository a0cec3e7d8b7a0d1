"""What each owner takes of a Ray node, and whether a cluster has room for it."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kfdist.config import ClusterSection

Node = Mapping[str, Any]
"""A node as `ray.nodes()` describes it."""

_NODES_SHOWN = 6
_IN = re.compile(r"in\((.*)\)")


def resources_of(cluster: ClusterSection) -> dict[str, float]:
    """Returns an owner's resources by Ray's names, those it needs none of left out."""
    bundle = cluster.bundle
    cpus = cluster.threads if bundle.cpus is None else bundle.cpus
    return {"CPU": cpus, **({"GPU": bundle.gpus} if bundle.gpus else {}), **bundle.resources}


def actor_options(cluster: ClusterSection) -> dict[str, Any]:
    """Returns an owner's resources as Ray's options of an actor."""
    resources = resources_of(cluster)
    return {"num_cpus": resources.pop("CPU"), "num_gpus": resources.pop("GPU", 0), "resources": resources}


def shortage(cluster: ClusterSection, nodes: Sequence[Node], *, strategy: str) -> str:
    """Says why owners can't be placed on some nodes even if nobody else uses them; empty if they can.

    Args:
        cluster: How many owners there are to be, and what each takes.
        nodes: The living nodes.
        strategy: How they are to be placed, by Ray's names.
    """
    resources, labels = resources_of(cluster), cluster.bundle.labels
    rooms = [_room(node, resources) if _fits(node, labels) else 0 for node in nodes]
    match strategy:
        case "STRICT_SPREAD":
            room = sum(here > 0 for here in rooms)
        case "STRICT_PACK":
            room = max(rooms, default=0)
        case _:
            room = sum(rooms)
    return "" if room >= cluster.owners else f"{needs(cluster)}; there is room for {room}: {_shown(nodes, cluster)}"


def needs(cluster: ClusterSection) -> str:
    """Returns what each owner needs, in words."""
    texts = [f"{name} {amount:g}" for name, amount in resources_of(cluster).items()]
    texts += [f"a node with {name}={value}" for name, value in cluster.bundle.labels.items()]
    return f"each needs {', '.join(texts)}"


def _room(node: Node, resources: Mapping[str, float]) -> int:
    """Returns how many owners a node has room for while nothing else is there."""
    has = node["Resources"]
    # Ray counts in ten-thousandths, and three times a third is one.
    return min(math.floor(has.get(name, 0) / amount + 1e-4) for name, amount in resources.items())


def _fits(node: Node, labels: Mapping[str, str]) -> bool:
    """Tells whether a node's labels are as Ray's selectors say: a value, in(VALUES), or ! and one of these."""
    for name, selector in labels.items():
        wanted = selector.removeprefix("!")
        listed = _IN.fullmatch(wanted)
        values = [value.strip() for value in listed[1].split(",")] if listed else [wanted]
        if (node.get("Labels", {}).get(name) in values) == selector.startswith("!"):
            return False
    return True


def _shown(nodes: Sequence[Node], cluster: ClusterSection) -> str:
    texts = []
    for node in nodes[:_NODES_SHOWN]:
        has = [f"{name} {node['Resources'].get(name, 0):g}" for name in resources_of(cluster)]
        has += [f"{name}={node.get('Labels', {}).get(name, '(none)')}" for name in cluster.bundle.labels]
        texts.append(f"{node['NodeManagerAddress']} has {', '.join(has)}")
    if len(nodes) > _NODES_SHOWN:
        texts.append(f"{len(nodes) - _NODES_SHOWN} more nodes")
    return "; ".join(texts) or "no node lives"
