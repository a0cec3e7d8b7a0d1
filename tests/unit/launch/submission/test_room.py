"""Whether a run fits into a cluster."""

import pytest

from kfdist.config import Config, load_config
from kfdist.errors import EnvironmentFault
from kfdist.launch.submission.room import check_room
from kfdist.pool.bundles import Node


def run(*overrides: str) -> Config:
    return load_config(None, overrides=overrides, environment={})


def nodes(*cpus_and_gpus: tuple[int, int]) -> list[Node]:
    return [
        {
            "Resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {})},
            "Labels": {},
            "NodeManagerAddress": f"10.0.0.{i}",
        }
        for i, (cpus, gpus) in enumerate(cpus_and_gpus)
    ]


TLS = "security.certificates=/etc/kfdist"
HEAD = "10.0.0.0"


@pytest.mark.parametrize(
    ("overrides", "cluster", "gpus"),
    [
        ([], nodes((4, 0)), 0),
        ([TLS], nodes((0, 0), (2, 0), (2, 0)), 0),
        (["cluster.link=local"], nodes((2, 0)), 0),
        (["preconditioner.method=none"], nodes((2, 0)), 0),
        ([TLS, "cluster.threads=3"], nodes((0, 0), (6, 0), (6, 0)), 0),
        ([TLS, "cluster.workers=4"], nodes((0, 0), (4, 2), (4, 2)), 1),
        ([TLS, "cluster.workers=3", "cluster.bundle.gpus=0.5"], nodes((8, 4)), 1),
    ],
)
def test_what_fits_just_so(overrides: list[str], cluster: list[Node], gpus: int):
    check_room(cluster, HEAD, run(*overrides), gpus)


@pytest.mark.parametrize(
    ("overrides", "cluster", "gpus", "told"),
    [
        (
            [],
            nodes((3, 0)),
            0,
            "2 ranks with CPU 1 each and 2 owners with CPU 1 each don't fit: 10.0.0.0 has CPU 3; add nodes, or ask for "
            "fewer with --workers and --owners",
        ),
        (
            [],
            nodes((0, 0), (8, 0)),
            0,
            "cluster.owners = 2 can't be placed: each needs CPU 1; there is room for 0: 10.0.0.0 has CPU 0; without "
            "TLS a run can't leave the head node: make certificates with `kfdist certs init DIR` and set "
            "security.certificates, so that all 2 nodes count, or ask for fewer with --workers and --owners",
        ),
        ([TLS, "cluster.workers=9"], nodes((4, 0), (4, 0)), 0, "9 ranks with CPU 1 each and 2 owners"),
        # Each node has CPUs left over, of which no rank can be made.
        (["cluster.link=local", TLS, "cluster.threads=3"], nodes((2, 0), (2, 0), (5, 0)), 0, "2 ranks with CPU 3 each"),
        (
            [TLS],
            nodes((8, 1)),
            1,
            "2 ranks with CPU 1, GPU 1 each and 2 owners with CPU 1 each don't fit: 10.0.0.0 has",
        ),
        ([TLS], nodes((8, 0), (1, 8)), 1, "10.0.0.0 has CPU 8, GPU 0; 10.0.0.1 has CPU 1, GPU 8; add nodes"),
        (
            [TLS],
            nodes((8, 0)),
            1,
            "10.0.0.0 has CPU 8, GPU 0; add nodes, or ask for fewer with --workers and --owners; on ",
        ),
        ([TLS, "cluster.bundle.gpus=0.6"], nodes((8, 3)), 1, "2 owners with CPU 1, GPU 0.6 each don't fit"),
    ],
)
def test_what_does_not_fit_is_told_in_numbers(overrides: list[str], cluster: list[Node], gpus: int, told: str):
    with pytest.raises(EnvironmentFault) as caught:
        check_room(cluster, HEAD, run(*overrides), gpus)
    assert told in str(caught.value)
