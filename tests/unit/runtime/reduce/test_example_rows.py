"""Rows of examples from all ranks in frames of one size: budgets, positions, and what counts for nothing."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kfdist.curvature.averages import ExampleRows
from kfdist.curvature.statistics import SampleBudget, Samples
from kfdist.runtime.reduce.example_rows import (
    SampleExchange,
    SampleRequest,
    examples_per_rank,
    local_samples,
)
from kfdist.types import BlockShape
from tests.support.lockstep import in_lockstep
from tests.support.matrices import gaussian

P, Q = 3, 4


def rows(n: int, t: int, *, seed: int = 0, weight: float = 1.0) -> ExampleRows:
    a, g = gaussian(1, n, t, Q, seed=2 * seed), gaussian(1, n, t, P, seed=2 * seed + 1)
    each = torch.full((n,), weight, dtype=torch.float64)
    return ExampleRows(a, g, weight=each, terms=torch.ones_like(each), positions=torch.full((n,), float(t)), frame=t)


def request(own: ExampleRows | None, **changes: Any) -> SampleRequest:
    return SampleRequest(
        **{
            "block": "layer",
            "shape": BlockShape(groups=1, d_in=Q, d_out=P, convolution=True),
            "budget": SampleBudget(examples=8),
            "rows": own,
            "step_is_finite": None,
            "destination": None,
            "seed": 0,
            "dtype": torch.float64,
            **changes,
        }
    )


def gathered(of_ranks: Sequence[ExampleRows | None], **changes: Any) -> list[Samples | None]:
    """Every rank's samples after one exchange."""

    def run(communicator: Any) -> Samples | None:
        exchange = SampleExchange(communicator, torch.device("cpu"))
        return exchange.gather([request(of_ranks[communicator.rank], **changes)]).get("layer")

    return in_lockstep(len(of_ranks), run)


def gradients(samples: Samples | ExampleRows) -> Tensor:
    return (samples.g.mT @ samples.a)[0]


def fisher_sum(samples: Samples | ExampleRows) -> Tensor:
    """sum_i weight_i vec(S_i) vec(S_i)^T."""
    flat = gradients(samples).flatten(1)
    return (flat.mT * samples.weight) @ flat


def second_moments(samples: Samples | ExampleRows) -> Tensor:
    """Sums of a a^T and of g g^T over all rows, as one vector."""
    return torch.cat([(side.mT @ side).sum((0, 1)).flatten() for side in (samples.a, samples.g)])


def test_frames_are_agreed_and_filled_up() -> None:
    own = [rows(4, 2, seed=1), rows(3, 5, seed=2)]
    for samples in gathered(own):
        assert samples is not None
        assert samples.a.shape == (1, 8, 5, Q)
        assert samples.positions.tolist() == [2.0] * 4 + [5.0] * 3 + [0.0]
        assert samples.weight.tolist() == [1.0] * 7 + [0.0]
        assert samples.source.tolist() == [0] * 4 + [1] * 4
        torch.testing.assert_close(gradients(samples)[:4], gradients(own[0]))
        torch.testing.assert_close(gradients(samples)[4:7], gradients(own[1]))
        assert not samples.a[:, 7].any()


def test_only_the_destination_gets_rows() -> None:
    found = gathered([rows(2, 1, seed=rank) for rank in range(3)], destination=1)
    assert [samples is not None for samples in found] == [False, True, False]


def test_a_rank_without_a_batch_adds_rows_of_no_weight() -> None:
    for samples in gathered([None, rows(4, 2)]):
        assert samples is not None
        assert samples.weight.tolist() == [0.0] * 4 + [1.0] * 4
    assert gathered([None, None]) == [None, None]


def test_frames_are_agreed_when_some_rank_has_rows_and_then_kept() -> None:
    batches = [[None, None], [rows(2, 3), None], [rows(2, 6), rows(2, 1)]]

    def run(communicator: Any) -> tuple[list[int], Samples]:
        exchange = SampleExchange(communicator, torch.device("cpu"))
        sizes: list[int] = []
        found: dict[str, Samples] = {}
        for batch in batches:
            found = exchange.gather([request(batch[communicator.rank])])
            sizes.append(exchange.frames["layer"])
        resumed = SampleExchange(communicator, torch.device("cpu"))
        resumed.frames.update(exchange.frames)
        resumed.gather([request(rows(1, 9))])
        assert resumed.frames["layer"] == 3
        return sizes, found["layer"]

    for sizes, samples in in_lockstep(2, run):
        assert sizes == [0, 3, 3]
        assert samples.a.shape == (1, 8, 3, Q)


@pytest.mark.parametrize("spoiled", ["non-finite", "skipped step"])
def test_spoiled_rows_and_skipped_steps_weigh_zero_and_are_zero(spoiled: str) -> None:
    own = rows(4, 2)
    skip = None
    if spoiled == "non-finite":
        own.g[0, 1, 0, 0] = torch.inf
        own.a[0, 2, 0, 0] = torch.nan
    else:
        skip = torch.tensor(False)
    for samples in gathered([own, rows(4, 2, seed=3)], step_is_finite=skip):
        assert samples is not None
        assert samples.weight.tolist() == [0.0] * 4 + [0.0 if skip is not None else 1.0] * 4
        assert not samples.a[:, :4].any()
        assert not samples.g[:, :4].any()


@pytest.mark.parametrize(
    ("budget", "positions", "world_size", "expected"),
    [
        (SampleBudget(examples=8), 1, 2, 4),
        (SampleBudget(examples=9), 1, 4, 3),  # at least the budget in all
        (SampleBudget(examples=3), 1, 8, 1),
        (SampleBudget(examples=8, rows=12), 3, 2, 2),
        (SampleBudget(examples=8, rows=12), 100, 2, 1),  # one example always
        (SampleBudget(examples=8, rows=12, columns=2), 100, 2, 3),  # what travels are columns
    ],
)
def test_a_ranks_share_of_a_budget(budget: SampleBudget, positions: int, world_size: int, expected: int) -> None:
    assert examples_per_rank(budget, positions, world_size) == expected


def test_a_budget_of_rows_is_shared_and_weights_make_up_for_what_is_left_out() -> None:
    for samples in gathered([rows(6, 3, seed=rank) for rank in range(2)], budget=SampleBudget(examples=12, rows=12)):
        assert samples is not None
        assert samples.a.shape == (1, 4, 3, Q)
        assert samples.weight.tolist() == [3.0] * 4


def test_a_ranks_own_rows_keep_to_its_share_of_the_rows() -> None:
    def run(communicator: Any) -> Samples:
        own = request(rows(6, 3, weight=2.0), budget=SampleBudget(examples=12, rows=12))
        return local_samples(own, communicator, torch.device("cpu"))

    for rank, samples in enumerate(in_lockstep(2, run)):
        assert samples.a.shape == (1, 2, 3, Q)
        assert samples.weight.tolist() == [6.0] * 2
        assert samples.source.tolist() == [rank] * 2


def test_a_rank_without_a_batch_has_no_rows_of_its_own() -> None:
    (samples,) = in_lockstep(1, lambda each: local_samples(request(None), each, torch.device("cpu")))
    assert samples.weight.numel() == 0


def test_draws_of_examples_and_positions_are_unbiased() -> None:
    """Over 1000 seeds the mean of the Fisher sums is that of all examples; that of the gradients all positions'."""
    own, draws = rows(5, 4), 1000

    def run(communicator: Any) -> tuple[Tensor, Tensor, Tensor]:
        exchange = SampleExchange(communicator, torch.device("cpu"))
        fisher, exchange.frames["all"], exchange.frames["two"] = [], 4, 2
        sums, moments = [], []
        for seed in range(draws):
            some = request(own, block="all", budget=SampleBudget(examples=2), seed=seed)
            fewer = request(own, block="two", budget=SampleBudget(examples=5), seed=seed)
            found = exchange.gather([some, fewer])
            fisher.append(fisher_sum(found["all"]))
            sums.append(gradients(found["two"]))
            moments.append(second_moments(found["two"]))
        return torch.stack(fisher), torch.stack(sums), torch.stack(moments)

    ((fisher, sums, moments),) = in_lockstep(1, run)
    for drawn, truth in ((fisher, fisher_sum(own)), (sums, gradients(own)), (moments, second_moments(own))):
        # Five standard errors of a mean of so many draws.
        error = drawn.std(0) / draws**0.5
        assert ((drawn.mean(0) - truth).abs() <= 5 * error + 1e-12).all()


def test_more_positions_than_columns_keep_their_gradients() -> None:
    own = rows(3, 6)
    for samples in gathered([own], budget=SampleBudget(examples=3, columns=4)):
        assert samples is not None
        assert samples.a.shape[2] <= 4
        assert samples.positions.tolist() == [6.0] * 3
        torch.testing.assert_close(gradients(samples), gradients(own), rtol=1e-10, atol=1e-10)
