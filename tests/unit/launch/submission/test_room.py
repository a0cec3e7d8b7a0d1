"""Whether a run fits into a cluster."""

from typing import Any

import pytest

from kfdist.config import Config, load_config
from kfdist.errors import EnvironmentFault
from kfdist.launch.submission.room import Node, check_room


def run(*overrides: str) -> Config:
    return load_config(None, overrides=overrides, environment={})


def nodes(*cpus_and_gpus: tuple[int, int]) -> list[Node]:
    return [Node(cpus=cpus, gpus=gpus, is_head=not index) for index, (cpus, gpus) in enumerate(cpus_and_gpus)]


TLS = "security.certificates=/etc/kfdist"


@pytest.mark.parametrize(
    ("overrides", "cluster", "gpus"),
    [
        ([], nodes((4, 0)), 0),
        ([TLS], nodes((0, 0), (2, 0), (2, 0)), 0),
        (["cluster.link=local"], nodes((2, 0)), 0),
        (["preconditioner.method=none"], nodes((2, 0)), 0),
        ([TLS, "cluster.threads=3"], nodes((1, 0), (4, 0), (3, 0)), 0),
        ([TLS, "cluster.workers=4"], nodes((0, 0), (4, 2), (4, 2)), 1),
    ],
)
def test_what_fits_just_so(overrides: list[str], cluster: list[Node], gpus: int):
    check_room(cluster, run(*overrides), gpus)


@pytest.mark.parametrize(
    ("overrides", "cluster", "gpus", "told"),
    [
        (
            [],
            nodes((3, 0)),
            0,
            "2 ranks with 1 CPU each and 2 owners with 1 CPU each don't fit: the head node has CPUs [3]; add nodes, "
            "or ask for fewer with --workers and --owners",
        ),
        ([], nodes((0, 0), (8, 0)), 0, "the head node has CPUs [0]; without TLS a run can't leave it: make "),
        ([TLS, "cluster.workers=9"], nodes((4, 0), (4, 0)), 0, "9 ranks .* the cluster's nodes have CPUs [4, 4]; add"),
        # Each node has CPUs left over, of which no rank can be made.
        ([TLS, "cluster.threads=3"], nodes((2, 0), (2, 0), (5, 0)), 0, "2 ranks with 3 CPUs each"),
        ([TLS], nodes((8, 1)), 1, "2 ranks with 1 CPU and 1 GPU each and 2 owners with 1 CPU each don't fit"),
        ([TLS], nodes((8, 0), (1, 8)), 1, "have CPUs [8, 1] and GPUs [0, 8]"),
    ],
)
def test_what_does_not_fit_is_told_in_numbers(overrides: list[str], cluster: list[Node], gpus: int, told: Any):
    with pytest.raises(EnvironmentFault) as caught:
        check_room(cluster, run(*overrides), gpus)
    first, _, last = told.partition(" .* ")
    assert first in str(caught.value) and last in str(caught.value)
