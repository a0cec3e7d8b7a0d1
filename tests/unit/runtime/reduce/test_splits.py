"""What ranks and micro-batches measure adds up to what one process finds on all rows at once, whatever the lengths.

Truth are the rows of each example by itself, put together as kfdist/curvature/statistics.py says. Ranks are threads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfdist.capture.capture import Capture
from kfdist.curvature.averages import BatchStatistics, means
from kfdist.curvature.inverter import AbstractInverter, Coupling
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.references import factors_of_rows, weighted_fisher
from kfdist.curvature.statistics import Increment, Samples
from kfdist.linalg.psd import unpack_triangle
from kfdist.runtime.plan.planner import Plan
from kfdist.runtime.plan.timetable import Timetable
from kfdist.runtime.reduce.example_rows import SampleRequest, local_samples
from kfdist.runtime.reduce.reducer import StatisticsReducer
from kfdist.runtime.track import Track
from tests.support.captured_methods import CAPTURED
from tests.support.factors import Factors, rows_by_definition
from tests.support.lockstep import in_lockstep
from tests.support.plans import planned
from tests.support.tiers import in_turn

EXACT = 1e-10
"""float64 sums over a few dozen rows, in another order."""

CPU = torch.device("cpu")
Q, P, CLASSES = 3, 12, 2


@dataclass(frozen=True)
class Part:
    """One micro-batch: n examples of T positions each, and how it is spoiled."""

    n: int
    t: int
    spoiled: bool = False


Split = Sequence[Sequence[Part]]
"""Micro-batches by rank; a rank's losses are divided by their number."""

SPLITS: Mapping[str, Split] = {
    "one process": [[Part(3, 2)]],
    "ranks of one length": [[Part(3, 4)], [Part(3, 4)]],
    "ranks with more and fewer examples": [[Part(5, 3)], [Part(1, 3)], [Part(2, 3)]],
    "ranks of two lengths": [[Part(3, 2)], [Part(3, 6)]],
    "micro-batches of two lengths": [[Part(3, 2), Part(3, 6)]],
    "everything uneven": [[Part(3, 2), Part(1, 6)], [Part(2, 5)], [Part(4, 1), Part(1, 3), Part(2, 2)]],
    "a rank without a batch": [[], [Part(3, 2)], [Part(2, 5)]],
    "a rank that isn't finite": [[Part(3, 2)], [Part(2, 4, spoiled=True)], [Part(1, 5)]],
}
SETTINGS: Mapping[str, dict[str, Any]] = {
    "b-kfac": {"rank": 1, "increment_rows": 64},
    "b-r-kfac": {"rank": 1, "increment_rows": 64},
    "b-kfac-c": {"rank": 1, "increment_rows": 64},
    "seng": {"columns": None},
    "cg-fac": {"rows": None},
    "ekfac": {"rows": None},
}
WIDE = frozenset({"b-kfac", "b-r-kfac", "b-kfac-c"})
"""Brand's updates need factors that are larger than an increment has rows."""


class Tokens(nn.Module):
    """Two layers at every position; the chain method has a sequence of one."""

    def __init__(self, wide: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = 70 if wide else P
        self.first, self.second = nn.Linear(70 if wide else Q, width), nn.Linear(width, CLASSES, bias=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def batch(part: Part, seed: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(part.n, part.t, width, generator=generator, dtype=torch.float64)
    y = torch.randn(part.n, part.t, CLASSES, generator=generator, dtype=torch.float64)
    return (x * torch.nan if part.spoiled else x), y


def token_losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().sum(-1)


def padded(plan: Plan, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With what the loss ignores at the end: positions, or examples where there is one position; and the mask."""
    dim = 0 if plan.groups[0].inverter.coupling is Coupling.CHAIN else 1
    more, ignored, mask = (
        torch.cat([each, torch.full_like(each.narrow(dim, 0, 1), value)], dim=dim)
        for each, value in ((x, 1e3), (y, 1.0), (torch.ones(x.shape[:2]), 0.0))
    )
    return more, ignored, mask


def measured(
    plan: Plan, parts: Sequence[tuple[Tensor, Tensor]], rank: int, stated: bool, masked: bool
) -> dict[str, BatchStatistics]:
    """What one rank's capture finds in its micro-batches."""
    groups = {
        coupling: [[b.name for b in group.blocks] for group in plan.groups if group.inverter.coupling is coupling]
        for coupling in Coupling
    }
    capture = Capture(
        plan.model,
        {block.name: block for block in plan.blocks},
        sampling=plan.settings.sampling,
        grad_scaler=None,
        chains=groups[Coupling.CHAIN],
        coarse=groups[Coupling.COARSE],
    )
    capture.arm(timetable(plan, rank).requests(0, calibrating={group.index for group in plan.groups}))
    for x, y in parts:
        if masked:
            more, ignored, mask = padded(plan, x, y)
            losses = (token_losses(plan.model, more, ignored) * mask)[mask > 0]
            capture.state_mask(mask)
        else:
            losses = token_losses(plan.model, x, y)
        if stated:
            capture.state_examples(y[..., 0].numel())
        (losses.sum() / (y[..., 0].numel() if stated else len(y)) / len(parts)).backward()
    found = capture.drain()
    capture.close()
    return found


def timetable(plan: Plan, rank: int) -> Timetable:
    schedules = plan.settings.schedules(len(plan.groups), together=True)
    tracks = [Track.of(group, queued=False) for group in plan.groups]
    return Timetable(schedules, tracks, seed=0, rank=rank, world_size=plan.world_size)


@dataclass(frozen=True)
class Reduced:
    """What rank 0 has after the reduction, by block."""

    sums: Mapping[str, Mapping[str, Tensor]]
    samples: Mapping[str, Samples]
    scales: Mapping[str, Tensor]


def reduced(plan: Plan, batches: Sequence[Mapping[str, BatchStatistics]]) -> Reduced:
    def run(communicator: Any) -> tuple[Any, dict[str, Samples]]:
        table, own = timetable(plan, communicator.rank), batches[communicator.rank]
        reducer = StatisticsReducer(plan.groups, plan.settings, table, communicator, CPU)
        reducer.fold(table.due(0), own, None)
        calibrating = {}
        for group in plan.groups:
            for block in group.blocks:
                budget, found = group.needs[block.name].calibration, own.get(block.name)
                if budget is not None:
                    rows = None if found is None else found.samples
                    request = SampleRequest(
                        block=block.name,
                        shape=block.shape,
                        budget=budget,
                        rows=rows,
                        step_is_finite=None,
                        destination=None,
                        seed=0,
                        dtype=torch.float64,
                    )
                    calibrating[block.name] = local_samples(request, communicator, CPU)
        return reducer.reduce(table.due(0), own, None), calibrating

    of_ranks = in_lockstep(plan.world_size, run)
    reduction = of_ranks[0][0]
    samples = {
        name: next(found.samples[name] for found, _ in of_ranks if name in found.samples) for name in reduction.samples
    }
    return Reduced(reduction.sums, samples, scales([calibrating for _, calibrating in of_ranks]))


def scales(of_ranks: Sequence[Mapping[str, Samples]]) -> dict[str, Tensor]:
    """EKFAC's second moments in the coordinates' own basis, added up over the ranks as `calibrate` does."""
    found = {}
    for name in of_ranks[0]:
        total = sum(torch.einsum("n,nij->ij", each[name].weight, gradients_of(each[name]) ** 2) for each in of_ranks)
        found[name] = total / sum(each[name].examples for each in of_ranks)
    return found


def gradients_of(samples: Samples) -> Tensor:
    return torch.einsum("cntp,cntq->npq", torch.nan_to_num(samples.g), torch.nan_to_num(samples.a))


@dataclass(frozen=True)
class Truth:
    """All examples' rows of all ranks: by example and layer, a `[1, T, q]` and g `[1, T, p]` of the loss's terms."""

    rows: Sequence[Factors]
    stated: bool

    def sides(self, name: str) -> tuple[Tensor, Tensor]:
        a, g = (torch.cat([each[name][side][0] for each in self.rows]) for side in (0, 1))
        return a, g

    def count(self, name: str) -> int:
        return len(self.sides(name)[0]) if self.stated else len(self.rows)

    def moments(self, i: str, j: str) -> tuple[Tensor, Tensor]:
        """Omega and Gamma, or between two layers what stands beside them."""
        (a, g), (b, h) = self.sides(i), self.sides(j)
        return a.T @ b / self.count(i), g.T @ h / len(g)

    def fisher(self, name: str) -> Tensor:
        vectors = torch.stack(
            [torch.einsum("tp,tq->pq", g[0], a[0]).flatten() for a, g in (r[name] for r in self.rows)]
        )
        return vectors.T @ vectors / self.count(name)


def truth_of(model: nn.Module, split: Split, parts: Sequence[Sequence[tuple[Tensor, Tensor]]], stated: bool) -> Truth:
    examples = [
        (x[i : i + 1], y[i : i + 1])
        for of_rank, of_parts in zip(split, parts, strict=True)
        for part, (x, y) in zip(of_rank, of_parts, strict=True)
        for i in range(0 if part.spoiled else len(x))
    ]

    def loss(model: nn.Module, example: Any) -> Tensor:
        return token_losses(model, *example).sum()

    return Truth(rows_by_definition(model, examples, loss, ["first", "second"]), stated)


def check(inverter: AbstractInverter, found: Reduced, truth: Truth) -> None:
    for name in ("first", "second"):
        if name in found.sums:
            check_sums(inverter, name, found.sums[name], truth)
        if name in found.samples:
            close(weighted_fisher(found.samples[name])[0], truth.fisher(name))
            factors = factors_of_rows(found.samples[name])
            for mine, expected in zip((factors.A, factors.G), truth.moments(name, name), strict=True):
                close(mine[0], expected)
        if name in found.scales:
            close(found.scales[name].flatten(), truth.fisher(name).diagonal())


def check_sums(inverter: AbstractInverter, name: str, tensors: Mapping[str, Tensor], truth: Truth) -> None:
    a, g = truth.sides(name)
    mean_a, mean_g = a.mean(0) * (len(a) / truth.count(name)) ** 0.5, g.mean(0)
    Omega, Gamma = truth.moments(name, name)
    expected = {"A": Omega, "G": Gamma, "a": mean_a, "g": mean_g}
    if name == "first" and inverter.coupling is Coupling.CHAIN:
        expected["A_next"], expected["G_next"] = truth.moments("first", "second")
    if inverter.coupling is Coupling.COARSE:
        both = [truth.moments(name, other) for other in ("first", "second")]
        expected["a_cross"], expected["g_cross"] = (torch.stack([m[side].sum() for m in both]) for side in (0, 1))
    checked = 0
    for part, mean in means(tensors).items():
        if part in expected:
            close(unpack_triangle(mean)[0] if part in "AG" else mean.view_as(expected[part]), expected[part])
            checked += 1
    if inverter.statistic is Increment:
        for part, count in (("A", "examples"), ("G", "positions")):
            rows = tensors[f"{part}_rows"][0]
            if rows.numel():
                close(rows.T @ rows / tensors[count], expected[part])
                checked += 1
    assert checked >= 2


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT * float(expected.abs().max()))


def case(method: str, split: Split, *, stated: bool, **settings: Any) -> tuple[Plan, list[Any]]:
    if method == "kfac-tridiagonal":  # a chain has one position
        split = [[Part(part.n * part.t, 1, part.spoiled) for part in parts] for parts in split]
    model = Tokens(method in WIDE)
    inverter = make_inverter(method, **SETTINGS.get(method, {}), **({"assume_chain": True} if "tri" in method else {}))
    plan = planned(model, inverter, world_size=len(split), **settings)
    seeds = iter(range(100))
    parts = [[batch(part, next(seeds), model.first.in_features) for part in of_rank] for of_rank in split]
    return plan, [split, parts]


@pytest.mark.parametrize(
    ("method", "split", "loss"), in_turn(CAPTURED, SPLITS, ["per example", "per token", "padded"], of=3)
)
def test_any_split_is_one_process_on_all_rows(method: str, split: str, loss: str) -> None:
    stated = loss != "per example"
    plan, (parts_of, parts) = case(method, SPLITS[split], stated=stated)
    batches = [
        measured(plan, of_rank, rank, stated, loss == "padded") if of_rank else {} for rank, of_rank in enumerate(parts)
    ]
    check(plan.groups[0].inverter, reduced(plan, batches), truth_of(plan.model, parts_of, parts, stated))
