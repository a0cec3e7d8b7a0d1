"""A Ray cluster of two hosts."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence

from tests.support.commands import Command
from tests.support.hosts import Host

NO_TOKEN = {"RAY_AUTH_MODE": "disabled"}
# Ray's own niceness for workers, 15, would leave owners nothing beside other tests.
_NODE = {**NO_TOKEN, "RAY_worker_niceness": "0"}
OWN = ("--num-cpus", "2", "--object-store-memory", "100000000", "--disable-usage-stats", "--block")


@contextlib.contextmanager
def ray_nodes(
    hosts: Mapping[str, Host], *, head_has: Sequence[str] = (), node_has: Sequence[str] = ()
) -> Iterator[str]:
    """Starts a Ray node on the hosts `head` and `node`; yields the cluster's address.

    Args:
        hosts: The hosts, by name.
        head_has: Further arguments of `ray start` there, such as resources and labels.
        node_has: The same for the other node.
    """
    head, node = hosts["head"], hosts["node"]
    address = f"{head.address}:6379"
    directory = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's sockets need short paths
    start = ("start", "--head", "--node-ip-address", head.address, "--port", "6379", "--include-dashboard", "false")
    start += ("--temp-dir", directory)
    join = ("start", "--address", address, "--node-ip-address", node.address)
    module = "ray.scripts.scripts"
    try:
        with Command(*start, *OWN, *head_has, module=module, host=head.prefix, environment=_NODE) as first:
            first.wait_for_line("Ray runtime started")
            with Command(*join, *OWN, *node_has, module=module, host=node.prefix, environment=_NODE) as second:
                second.wait_for_line("Ray runtime started")
                yield address
    finally:
        shutil.rmtree(directory, ignore_errors=True)
