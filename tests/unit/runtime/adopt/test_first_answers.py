"""A resumed run whose owners come later than its ranks: it waits for the first inverses that it asks for."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import kfdist
from kfdist.errors import Interrupted, KfdistWarning
from kfdist.policies.staleness import Asap
from kfdist.types import Desired, JobResult, RunSettings
from tests.support.faulty.link import FaultyLink

PERIOD = 4


class LateOwners(FaultyLink):
    """Nobody delivers a result before this rank has looked so often; from `stop_at` on users want a stop."""

    def __init__(self, looks: float = 0, stop_at: float = float("inf")) -> None:
        super().__init__()
        self.looks, self.looked, self.stop_at = looks, 0, stop_at

    def poll(self) -> list[JobResult]:
        self.looked += 1
        if self.looked >= self.stop_at:
            self.wanted = RunSettings(revision=1, desired=Desired.STOPPED)
        return super().poll() if self.looked > self.looks else []


class Start:
    """One start of a run: a model trained in this process under asap."""

    def __init__(self, link: LateOwners, state: dict[str, Any] | None = None, **adoption: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
        periods = {"factor_period": 2, "inverse_period": PERIOD}
        self.pre = kfdist.Preconditioner(
            self.model, "kfac-eigen", damping=0.1, lr=0.1, link=link, adoption=Asap(**adoption), **periods
        )
        if state is not None:
            self.pre.load_state_dict(state)

    def steps(self, count: int) -> list[list[int]]:
        """Makes steps; returns the versions adopted at each."""
        adopted = []
        for _ in range(count):
            generator = torch.Generator().manual_seed(self.pre.next_step)
            x, y = torch.randn(16, 6, generator=generator), torch.randint(0, 4, (16,), generator=generator)
            self.model.zero_grad()
            nn.functional.cross_entropy(self.model(x), y).backward()
            adopted.append([version for _, version in self.pre.step().adopted])
        return adopted


@pytest.fixture
def state() -> dict[str, Any]:
    """A run's state after nine steps; nothing of what it asked for since step 0 has come."""
    start = Start(link := LateOwners())
    start.steps(1)
    link.looks = float("inf")
    start.steps(2 * PERIOD)
    kept = start.pre.state_dict()
    assert any(kept["pending"].values())
    start.pre.close()
    return kept


def test_it_waits_for_what_is_under_way_and_then_no_more(state: dict[str, Any]) -> None:
    resumed = Start(link := LateOwners(looks=50), state)
    (adopted,) = resumed.steps(1)
    assert len(adopted) == 2 and min(adopted) >= PERIOD, "both layers' newest inverses under way"
    assert link.looked > 50
    link.looks = float("inf")
    assert not any(resumed.steps(3 * PERIOD)), "asap waits for nobody once an owner has answered"
    resumed.pre.close()


def test_where_nobody_answers_it_goes_on_and_says_so_once(state: dict[str, Any]) -> None:
    resumed = Start(link := LateOwners(looks=float("inf")), state, wait_limit_seconds=0.02)
    with pytest.warns(
        KfdistWarning, match=r"no owner delivered an inverse in 0.02 s; the run goes on with those of its"
    ):
        resumed.steps(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.steps(PERIOD)
    link.looks = 0
    assert any(resumed.steps(3 * PERIOD)), "what came late is taken into use"
    resumed.pre.close()


def test_it_hears_a_stop_meanwhile_and_the_step_is_not_done(state: dict[str, Any]) -> None:
    resumed = Start(LateOwners(looks=float("inf"), stop_at=20), state)
    with pytest.raises(Interrupted, match="asked to stop while it waited"):
        resumed.steps(1)
    assert resumed.pre.next_step == 2 * PERIOD + 1
    resumed.pre.close()
