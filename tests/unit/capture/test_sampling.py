"""Measuring a share of the examples or positions: unbiased, and the same wherever the seed is the same."""

import pytest
import torch
from torch import Tensor, nn

from kfdist.capture.capture import Capture
from kfdist.capture.requests import Request, Sampling
from kfdist.curvature.blocks import row_budget
from kfdist.errors import ConfigError
from tests.support.factors import armed_capture, assert_factors_equal, factors_of

SEEDS = 400
MONTE_CARLO = 5.0
"""Standard errors by which a mean over `SEEDS` draws may miss: for about 60 entries per factor, 5 is passed by chance
less than once in 10^4 runs, and the seeds are fixed anyway."""

N = T = 4
"""Equal on purpose: draws of examples and of positions must differ also where both permute equally many."""


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def measure(seed: int, sampling: Sampling, times: int = 1) -> dict[str, tuple[Tensor, Tensor]]:
    model = Tokens()
    return drained(model, armed_capture(model, sampling=sampling, seed=seed), times)


def measure_with_all_seeds(sampling: Sampling, times: int = 1) -> list[tuple[Tensor, Tensor]]:
    """With one model and one capture, whose making takes as long as measuring."""
    model = Tokens()
    capture, found = armed_capture(model, sampling=sampling), []
    for seed in range(SEEDS):
        capture.arm({"layer": Request(seed=seed)})
        found.append(drained(model, capture, times)["layer"])
    return found


def drained(model: nn.Module, capture: Capture, times: int) -> dict[str, tuple[Tensor, Tensor]]:
    x = torch.randn(N, T, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(times):
        (model(x) ** 2).sum(dim=(1, 2)).mean().div(times).backward()
    measured = capture.drain()
    assert measured["layer"].examples == N * times, "the number of examples is not sampled"
    return factors_of(measured)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(examples_fraction=0.5),
        Sampling(positions_fraction=0.5),
        Sampling(examples_fraction=0.5, positions_fraction=0.5),
        Sampling(examples_fraction=0.01, positions_fraction=0.75),
    ],
    ids=str,
)
def test_the_estimates_are_unbiased(sampling: Sampling):
    truth = measure(0, Sampling())["layer"]
    assert_unbiased(measure_with_all_seeds(sampling), truth)


def assert_unbiased(draws: list[tuple[Tensor, Tensor]], truth: tuple[Tensor, Tensor]) -> None:
    for index, label in enumerate(("Omega", "Gamma")):
        drawn = torch.stack([draw[index] for draw in draws])
        error = drawn.std(0) / SEEDS**0.5
        assert (error > 0).any(), "nothing was sampled"
        missed = (drawn.mean(0) - truth[index]).abs() - MONTE_CARLO * error
        assert (missed <= 1e-12).all(), f"{label} is off by {missed.max()} beyond {MONTE_CARLO} standard errors"


@pytest.fixture
def costly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the rows of the smallest layer cost too much."""
    monkeypatch.setattr(row_budget, "CHEAP", 0)
    monkeypatch.setattr(row_budget, "LEAST_ROWS", 2)


@pytest.mark.usefixtures("costly")
@pytest.mark.parametrize("times", [1, 2])
def test_rows_drawn_by_their_cost_are_unbiased(times: int):
    truth = measure(0, Sampling(examples_fraction=1.0), times)["layer"]
    assert_unbiased(measure_with_all_seeds(Sampling(), times), truth)
    assert_factors_equal(measure(3, Sampling(), times), measure(3, Sampling(), times), 0.0)


@pytest.mark.usefixtures("costly")
@pytest.mark.parametrize("request_of", [{"whole": True}, {"rows": frozenset({"A"})}], ids=["first", "rows"])
def test_what_is_asked_whole_is_measured_whole(request_of: dict[str, object]):
    model, x = Tokens(), torch.randn(N, T, 3, dtype=torch.float64)
    capture = armed_capture(model, sampling=Sampling(), **request_of)
    (model(x) ** 2).sum(dim=(1, 2)).mean().backward()
    batch = capture.drain()["layer"]
    rows = torch.cat([x, torch.ones(N, T, 1, dtype=torch.float64)], dim=-1).flatten(0, 1)
    torch.testing.assert_close(batch.sums["A"][0], rows.mT @ rows)


def test_a_fraction_that_is_given_is_what_it_says_and_the_other_is_all():
    assert Sampling().by_cost
    for given in (Sampling(examples_fraction=1.0), Sampling(positions_fraction=0.5), Sampling(positions_budget=3)):
        assert not given.by_cost
    assert Sampling(examples_fraction=0.5).positions == 1.0
    assert Sampling(positions_budget=3).examples == 1.0


def test_the_same_seed_draws_the_same_and_another_does_not():
    sampling = Sampling(examples_fraction=0.5, positions_fraction=0.5)
    assert_factors_equal(measure(7, sampling), measure(7, sampling), 0.0)
    different = [measure(seed, sampling)["layer"][0] for seed in range(8)]
    assert len({tuple(each.flatten().tolist()) for each in different}) > 1


def test_the_draw_does_not_depend_on_what_happened_before_this_step():
    """A resumed run has had fewer forwards, and must draw the same."""
    sampling = Sampling(examples_fraction=0.5)
    model = Tokens()
    capture = armed_capture(model, sampling=sampling, seed=3)
    x = torch.randn(N, T, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(3):
        with torch.no_grad():
            model(x)
        (model(x) ** 2).sum(dim=(1, 2)).mean().backward()
        last = factors_of(capture.drain())
        assert_factors_equal(last, measure(3, sampling), 0.0)


def test_micro_batches_draw_differently():
    """Otherwise a layer would always see the same places of each micro-batch."""
    sampling = Sampling(examples_fraction=0.25)
    pooled = [measure(seed, sampling, times=2)["layer"][0] for seed in range(12)]
    single = [factors[0] for factors in measure_with_all_seeds(sampling)]
    seen = {tuple(each.flatten().tolist()) for each in single}
    assert any(tuple(each.flatten().tolist()) not in seen for each in pooled)


def test_an_example_without_a_batch_dimension_is_one_example():
    model = nn.Linear(6, 2).double()
    capture = armed_capture(model, sampling=Sampling(examples_fraction=0.5))
    capture.state_examples(1)
    x = torch.randn(6, dtype=torch.float64)
    (model(x) ** 2).sum().backward()
    a = torch.cat([x, torch.ones(1, dtype=torch.float64)])
    torch.testing.assert_close(factors_of(capture.drain())[""][0], torch.outer(a, a)[None])


@pytest.mark.parametrize("name", ["examples_fraction", "positions_fraction"])
@pytest.mark.parametrize("bad", [0.0, -0.1, 1.5, float("nan"), "1", True])
def test_other_fractions_are_refused(name: str, bad: object):
    with pytest.raises(ConfigError, match=f"^{name}: .* above 0 and at most 1"):
        Sampling(**{name: bad})  # type: ignore[arg-type]
