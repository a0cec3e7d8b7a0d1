"""What is refused before an owner is placed."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from kfdist.config import load_config
from kfdist.errors import EnvironmentFault
from kfdist.owner.owner import Owner, OwnerOptions
from kfdist.pool.placement import OwnerOnNode, place
from kfdist.system.credentials import Credentials, Role


def ray_of_one_node() -> Any:
    node = {"NodeID": "n", "NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 8.0}, "Labels": {}}
    context = SimpleNamespace(get_node_id=lambda: "n")
    return SimpleNamespace(get_runtime_context=lambda: context, nodes=lambda: [node])


@pytest.mark.parametrize(
    ("ray", "advice"), [("local", "name a cluster that has it in cluster.ray"), ("auto", "start Ray with more")]
)
def test_what_this_machines_ray_lacks_is_named_with_what_helps(ray: str, advice: str):
    config = load_config(None, overrides=[f"cluster.ray={ray}", "cluster.bundle.gpus=0.5"], environment={})
    with pytest.raises(EnvironmentFault) as caught:
        place(ray_of_one_node(), config)
    assert str(caught.value) == (
        "cluster.owners = 2 can't be placed on this machine's Ray node: each needs CPU 1, GPU 0.5; there is room for "
        f"0: 10.0.0.1 has CPU 8, GPU 0; {advice}, ask for fewer owners, or for less for each (cluster.bundle)"
    )


@pytest.mark.parametrize(("here", "used"), [("/here", "/here/owner.pem"), (None, "/there/owner.pem")])
def test_where_an_owners_certificates_are_its_node_says(monkeypatch, here: str | None, used: str):
    if here is None:
        monkeypatch.delenv("KFDIST_SECURITY__CERTIFICATES", raising=False)
    else:
        monkeypatch.setenv("KFDIST_SECURITY__CERTIFICATES", here)
    started: list[OwnerOptions] = []
    monkeypatch.setattr(Owner, "__init__", lambda self, options: started.append(options))
    monkeypatch.setitem(sys.modules, "ray.util", SimpleNamespace(get_node_ip_address=lambda: "10.0.0.2"))
    OwnerOnNode(OwnerOptions(owner_id="a", credentials=Credentials.at(Role.OWNER, "/there", None)))
    (options,) = started
    assert options.host == "10.0.0.2" and options.credentials is not None
    assert str(options.credentials.identity_files[0]) == used


def test_a_bundle_that_ray_refuses_on_this_machine_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch):
    def refuse(bundles: list[Any], **given: Any) -> None:
        assert len(bundles) == len(given["bundle_label_selector"]) == 2
        raise ValueError("Invalid label key name `my zone`")

    monkeypatch.setitem(sys.modules, "ray.util", SimpleNamespace(placement_group=refuse))
    strategies = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda **given: given)
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)
    config = load_config(
        None, overrides=["cluster.ray=auto", 'cluster.bundle.labels={"my zone" = "!a"}'], environment={}
    )
    with pytest.raises(
        EnvironmentFault, match=r"this machine's Ray node: Ray refuses .* Invalid label key name `my zone`"
    ):
        place(ray_of_one_node(), config)
