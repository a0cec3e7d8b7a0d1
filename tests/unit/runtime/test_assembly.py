"""What ranks agree on before they share work."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import kfdist
from kfdist.comm.communicator import Communicator
from kfdist.errors import EnvironmentFault
from kfdist.runtime import assembly
from kfdist.runtime.assembly import _agree_on_terms, _pipeline
from kfdist.runtime.plan.planner import Plan
from tests.support.plans import planned


class Beside(Communicator):
    """One of two ranks, alone: the other says the same, but for what its owners' numbers depend on."""

    def __init__(self, others: str) -> None:
        super().__init__(None)
        self.others = others

    def all_gather_json(self, value: Any) -> list[Any]:
        other = value
        if isinstance(value, list):
            other = [[value[0][0], self.others], None]
        elif isinstance(value, dict) and "inverters' fingerprint" in value:
            other = value | {"inverters' fingerprint": self.others}
        return [value, other]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> kfdist.Service:
    """Owners with GPUs, for ranks of which this one has a GPU "cuda;A"."""
    monkeypatch.setattr(assembly, "fingerprint", lambda device, threads: "cuda;A" if device == "cuda" else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return kfdist.connect("127.0.0.1:1", device="cuda")


def plan_with(adoption: kfdist.Asap | kfdist.FixedLag) -> Plan:
    return planned(nn.Linear(3, 2), "kfac", adoption=adoption)


@pytest.mark.parametrize(("others", "agreed"), [("cuda;A", "cuda;A"), ("cuda;B", ""), ("", "")])
def test_under_asap_ranks_may_have_different_gpus_but_then_no_lag(
    service: kfdist.Service, others: str, agreed: str
) -> None:
    plan = plan_with(kfdist.Asap())
    terms = _agree_on_terms(plan, Beside(others), service)
    assert terms.fingerprint == agreed
    alone = SimpleNamespace(**dict.fromkeys(("training", "table", "snapshots", "statistics"), Communicator(None)))
    in_force = _pipeline(plan, terms, alone, kfdist.links.local.LocalLink(), None).in_force  # pyright: ignore
    refused = in_force.take({"adoption": "fixed-lag", "lag": 2})
    assert refused.startswith("" if agreed else "lag: can't be changed: with a fixed lag, owners must compute")
    assert bool(refused) == (not agreed) == ("lag" in in_force.told(0).fixed)


def test_with_a_fixed_lag_the_ranks_must_have_the_same_gpus(service: kfdist.Service) -> None:
    with pytest.raises(EnvironmentFault, match="rank 0: cuda;A; rank 1: cuda;B"):
        _agree_on_terms(plan_with(kfdist.FixedLag(2)), Beside("cuda;B"), service)
