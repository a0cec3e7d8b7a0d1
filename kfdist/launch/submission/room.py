"""Whether a cluster could ever hold a run; Ray itself would wait for ever for room that isn't there."""

from collections.abc import Mapping, Sequence

from kfdist.config import Config
from kfdist.errors import EnvironmentFault
from kfdist.pool.bundles import Node, resources_of, shortage


def rank_resources(config: Config, gpus_per_worker: int) -> dict[str, float]:
    """Returns what a rank takes of a node, by Ray's names."""
    return {"CPU": config.cluster.threads, **({"GPU": gpus_per_worker} if gpus_per_worker else {})}


def has_owners(config: Config) -> bool:
    """Says whether a run needs a pool."""
    return config.cluster.link == "service" and config.preconditioner.inverts and config.cluster.owners > 0


def check_room(nodes: Sequence[Node], head: str, config: Config, gpus_per_worker: int) -> None:
    """Checks that the ranks and owners of a run would fit if nobody else used the cluster.

    Without certificates the run stays on the node of its job, as all that it opens is on loopback.

    Args:
        nodes: The living nodes.
        head: The address of the head node, where jobs are started.
        config: The configuration.
        gpus_per_worker: GPUs of each rank.

    Raises:
        EnvironmentFault: They don't fit; says what is needed, what there is and what to do.
    """
    confined = config.security.certificates is None
    usable = [node for node in nodes if not confined or node["NodeManagerAddress"] == head]
    advice = "add nodes, or ask for fewer with --workers and --owners"
    if confined and len(nodes) > len(usable):
        advice = (
            f"without TLS a run can't leave the head node: make certificates with `kfdist certs init DIR` and set "
            f"security.certificates, so that all {len(nodes)} nodes count, or ask for fewer with --workers and --owners"
        )
    cluster, ranks = config.cluster, config.cluster.workers
    strategy = "STRICT_PACK" if confined else cluster.owner_strategy
    if has_owners(config) and (missing := shortage(cluster, usable, strategy=strategy)):
        raise EnvironmentFault(f"cluster.owners = {cluster.owners} can't be placed: {missing}; {advice}")
    each = rank_resources(config, gpus_per_worker)
    seats = sum(min(int(_has(node, name) // amount) for name, amount in each.items()) for node in usable)
    owners = resources_of(cluster) if has_owners(config) else {}
    together = {name: ranks * each.get(name, 0) + cluster.owners * owners.get(name, 0) for name in (*each, *owners)}
    short = [name for name, amount in together.items() if amount > sum(_has(node, name) for node in usable) + 1e-4]
    if seats >= ranks and not short:
        return
    needed = f"{ranks} ranks with {_listed(each)} each"
    needed += f" and {cluster.owners} owners with {_listed(owners)} each" if owners else ""
    if gpus_per_worker and not any(_has(node, "GPU") for node in usable):
        advice = f"{advice}; on CPUs it trains with --gpus-per-worker 0"
    names = list(together)
    has = "; ".join(f"{node['NodeManagerAddress']} has {_listed({n: _has(node, n) for n in names})}" for node in usable)
    raise EnvironmentFault(f"{needed} don't fit: {has or 'no node lives'}; {advice}")


def _has(node: Node, name: str) -> float:
    return node["Resources"].get(name, 0)


def _listed(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items())
