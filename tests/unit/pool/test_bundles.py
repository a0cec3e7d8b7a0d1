"""What owners take of a Ray cluster's nodes, and what is said where there is no room, in whatever words Ray has it."""

import pytest

from kfdist.config import ClusterSection
from kfdist.pool.bundles import actor_options, resources_of, shortage


def cluster(owners: int = 2, threads: int = 1, **bundle: object) -> ClusterSection:
    return ClusterSection.model_validate({"owners": owners, "threads": threads, "bundle": bundle})


def node(address: str = "a", labels: dict[str, str] | None = None, **resources: float) -> dict[str, object]:
    return {"NodeManagerAddress": address, "Resources": resources, "Labels": labels or {}}


def test_an_owner_takes_as_many_cpus_as_its_threads_and_nothing_else_unless_told():
    assert resources_of(cluster(threads=3)) == {"CPU": 3}
    assert actor_options(cluster(threads=3)) == {"num_cpus": 3, "num_gpus": 0, "resources": {}}


def test_all_that_an_owner_takes_is_in_its_bundle_and_in_its_actor():
    asked = cluster(cpus=0.5, gpus=0.25, resources={"inverter": 1})
    assert resources_of(asked) == {"CPU": 0.5, "GPU": 0.25, "inverter": 1}
    assert actor_options(asked) == {"num_cpus": 0.5, "num_gpus": 0.25, "resources": {"inverter": 1}}


@pytest.mark.parametrize(
    ("strategy", "asked", "nodes", "room"),
    [
        ("SPREAD", cluster(3), [node(CPU=1), node(CPU=2)], 3),
        ("PACK", cluster(3), [node(CPU=1), node(CPU=1)], 2),
        ("STRICT_SPREAD", cluster(3), [node(CPU=4), node(CPU=4)], 2),
        ("STRICT_PACK", cluster(3), [node(CPU=2), node(CPU=2)], 2),
        ("STRICT_PACK", cluster(3), [node(CPU=2), node(CPU=3)], 3),
        ("SPREAD", cluster(3, gpus=1 / 3), [node(CPU=8, GPU=1)], 3),
        ("SPREAD", cluster(2, gpus=0.6), [node(CPU=8, GPU=1)], 1),
        ("SPREAD", cluster(2, gpus=0.5), [node(CPU=8)], 0),
        ("SPREAD", cluster(2, resources={"inverter": 2}), [node(CPU=8, inverter=3)], 1),
        ("SPREAD", cluster(1, labels={"zone": "x"}), [node(CPU=8, labels={"zone": "y"}), node(CPU=8)], 0),
        ("SPREAD", cluster(1, labels={"zone": "!x"}), [node(CPU=8, labels={"zone": "x"})], 0),
        ("SPREAD", cluster(1, labels={"zone": "!x"}), [node(CPU=1, labels={"zone": "y"})], 1),
        ("SPREAD", cluster(1, labels={"zone": "in(x, y)"}), [node(CPU=1, labels={"zone": "y"})], 1),
        ("SPREAD", cluster(1, labels={"zone": "!in(x, y)"}), [node(CPU=1, labels={"zone": "y"})], 0),
        ("SPREAD", cluster(1), [], 0),
    ],
)
def test_how_many_there_is_room_for(strategy, asked, nodes, room):
    said = shortage(asked, nodes, strategy=strategy)
    assert (said == "") == (room >= asked.owners)
    assert said == "" or f"there is room for {room}:" in said


def test_what_is_missing_is_named_with_what_nodes_have():
    asked = cluster(3, gpus=0.5, resources={"inverter": 1}, labels={"zone": "x"})
    nodes = [
        node("10.0.0.1", CPU=4, GPU=1, inverter=2, labels={"zone": "x"}),
        node("10.0.0.2", CPU=4, memory=1e9),
        *(node(f"10.0.1.{i}", CPU=1) for i in range(20)),
    ]
    said = shortage(asked, nodes, strategy="SPREAD")
    assert said.startswith(
        "each needs CPU 1, GPU 0.5, inverter 1, a node with zone=x; there is room for 2: "
        "10.0.0.1 has CPU 4, GPU 1, inverter 2, zone=x; 10.0.0.2 has CPU 4, GPU 0, inverter 0, zone=(none); "
    )
    assert said.endswith("; 16 more nodes")
