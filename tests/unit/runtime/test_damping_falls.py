"""Inverses with the eigenpairs that damping leaves in need are made anew, once, where it falls below their margin."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import kfdist
from kfdist.curvature.inverse import KroneckerSpectrum

FALL = 3


class Run:
    """A wide layer trained in this process, with some damping at each step."""

    def __init__(self, damping: Callable[[int], float], method: Any = "rs-kfac", **arguments: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(70, 4))
        given: dict[str, Any] = {"factor_period": 2, "inverse_period": 8, "lr": 0.1, "adoption": kfdist.FixedLag(0)}
        self.pre = kfdist.Preconditioner(self.model, method, damping=damping, **given | arguments)
        self.ranks: list[int] = []

    def steps(self, count: int) -> list[int]:
        """Trains, and returns the steps at which an inverse was adopted."""
        adopted = []
        for _ in range(count):
            step = self.pre.pipeline.next_step
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(16, 70, generator=generator) * 0.9 ** torch.arange(70)
            self.model.zero_grad()
            self.model(x).square().sum(-1).mean().backward()
            if self.pre.step().adopted:
                adopted.append(step)
                (snapshot,) = (track.snapshot for track in self.pre.pipeline.tracks)
                inverse = snapshot.preconditioners["0"]
                self.ranks.append(inverse.U_A.shape[-1] if isinstance(inverse, KroneckerSpectrum) else 0)
        return adopted

    @property
    def refreshes(self) -> int:
        return self.pre.pipeline.counters.outgrown


def falling(step: int) -> float:
    return 1e-1 if step < FALL else 1e-9


@pytest.mark.parametrize(
    ("lag", "adopted"),
    [(0, [0, FALL + 1, 8]), (3, [0, FALL + 1 + 3, 8 + 3])],
    ids=["at once", "late"],
)
def test_an_inverse_is_made_anew_after_damping_fell_and_counted(lag: int, adopted: list[int]) -> None:
    run = Run(falling, adoption=kfdist.FixedLag(lag))
    assert run.steps(12) == adopted
    assert run.refreshes == 1 and run.pre.counters()["refreshes"] == 1
    assert run.ranks[0] == 32 < run.ranks[1] == run.ranks[2]
    run.pre.close()


@pytest.mark.parametrize(
    ("damping", "method"),
    [
        (lambda step: 1e-1 * 0.97**step, "rs-kfac"),  # halved in 23 steps: later than the next inverse
        (lambda step: 1e-9 if step < FALL else 1e-1, "rs-kfac"),
        (falling, "kfac-eigen"),
        (falling, kfdist.RsKfac(direction_error=0)),
    ],
    ids=["slowly", "up", "exact", "off"],
)
def test_nothing_is_made_anew_where_nothing_is_lacking(damping: Callable[[int], float], method: Any) -> None:
    run = Run(damping, method)
    assert run.steps(10) == [0, 8]
    assert run.refreshes == 0
    run.pre.close()


def test_one_that_failed_is_not_made_anew_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(falling)
    run.steps(FALL + 1)
    monkeypatch.setattr("kfdist.curvature.ladder.RESIDUAL_LIMIT", -1.0)
    assert run.steps(4) == [FALL + 1]
    assert run.refreshes == 1
    run.pre.close()


def test_what_is_to_be_made_anew_is_so_after_a_resume() -> None:
    run = Run(falling)
    run.steps(FALL + 1)
    again = Run(falling)
    again.pre.load_state_dict(run.pre.state_dict())
    assert again.steps(3) == run.steps(3) == [FALL + 1]
    run.pre.close()
    again.pre.close()
