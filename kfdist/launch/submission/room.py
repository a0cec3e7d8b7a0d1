"""Whether a cluster could ever hold a run; Ray itself would wait for ever for room that isn't there."""

from collections.abc import Sequence
from dataclasses import dataclass

from kfdist.config import Config
from kfdist.errors import EnvironmentFault


@dataclass(frozen=True, kw_only=True)
class Node:
    """A living node of a Ray cluster.

    Attributes:
        cpus: All of its CPUs, whoever uses them.
        gpus: All of its GPUs.
        is_head: Whether jobs are started here.
    """

    cpus: int
    gpus: int
    is_head: bool


def check_room(nodes: Sequence[Node], config: Config, gpus_per_worker: int) -> None:
    """Checks that the ranks and owners of a run would fit on empty nodes.

    Without certificates the run stays on the node of its job, as all that it opens is on loopback.

    Raises:
        EnvironmentFault: They don't; says what is needed, what there is and what to do.
    """
    confined = config.security.certificates is None
    usable = [node for node in nodes if node.is_head or not confined]
    ranks, threads = config.cluster.workers, config.cluster.threads
    owners = config.cluster.owners if has_owners(config) else 0
    seats = sum(
        min(node.cpus // threads, node.gpus // gpus_per_worker if gpus_per_worker else node.cpus) for node in usable
    )
    cpus = sum(node.cpus for node in usable)
    if seats >= ranks and cpus >= ranks * threads + owners:
        return
    needed = f"{ranks} ranks with {threads} CPU{'s' if threads > 1 else ''}"
    needed += f" and {gpus_per_worker} GPU each" if gpus_per_worker else " each"
    needed += f" and {owners} owners with 1 CPU each" if owners else ""
    has = f"CPUs {[node.cpus for node in usable]}" + (
        f" and GPUs {[node.gpus for node in usable]}" if gpus_per_worker else ""
    )
    where = "the head node has" if confined else "the cluster's nodes have"
    advice = "add nodes, or ask for fewer with --workers and --owners"
    if confined and len(nodes) > 1:
        advice = (
            f"without TLS a run can't leave it: make certificates with `kfdist certs init DIR`, set "
            f"security.certificates, and all {len(nodes)} nodes count; or ask for fewer with --workers and --owners"
        )
    raise EnvironmentFault(f"{needed} don't fit: {where} {has}; {advice}")


def has_owners(config: Config) -> bool:
    """Says whether a run needs a pool."""
    return config.cluster.link == "service" and config.preconditioner.inverts
