"""Every method measures and applies on any number of ranks what one process does on the union of their batches.

Budgets of examples are no smaller than the batches, so nothing is drawn; increments fit their slices.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfdist
from kfdist.comm.communicator import Communicator
from kfdist.comm.reduce import GradientReducer
from kfdist.curvature.inverters import make_inverter
from tests.support.ranks import run_ranks
from tests.support.small_models import images, small_cnn

STEPS = 3
"""Two inversions, and a step by each."""
EXACT = 1e-10
"""float64 sums over a few dozen rows in another order differ by units of 1e-15; 1e-10 leaves room for the inverses."""


class Pooled(nn.Module):
    """A sequence of tokens, pooled before the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 5, dtype=torch.float64)
        self.second = nn.Linear(5, 4, dtype=torch.float64)
        self.head = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1).view(len(x), 6, 12)
        return self.head(torch.tanh(self.second(torch.tanh(self.first(tokens)))).mean(1))


class Square(nn.Module):
    """A sequence of tokens through square matrices, pooled before the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 6, bias=False, dtype=torch.float64) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1).view(len(x), 12, 6)
        for layer in self.layers:
            tokens = torch.tanh(layer(tokens))
        return tokens.mean(1)


def perceptron() -> nn.Module:
    """Three layers, the first two with factors that Brand's updates take at rank 4 and 8 rows."""
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(72, 14), nn.Tanh(), nn.Linear(14, 13), nn.Tanh(), nn.Linear(13, 3)]
    return nn.Sequential(*layers).double()


def convolutional() -> nn.Module:
    """Two convolutions without groups."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3, stride=2), nn.Tanh(), nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(*layers).double()


@dataclass(frozen=True, kw_only=True)
class Case:
    """A method on a model.

    Attributes:
        model: One of `MODELS`.
        method: Its name.
        settings: Its settings.
        options: Of the Preconditioner.
        note: What `coverage()` must say of some parameter.
        batch: Examples a rank.
        tolerance: Relative and absolute.
    """

    model: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    batch: int = 4
    tolerance: float = EXACT


MODELS = {
    "grouped": small_cnn,
    "convolutional": convolutional,
    "perceptron": perceptron,
    "pooled": Pooled,
    "square": Square,
}
BRAND = {"rank": 4, "increment_rows": 8, "oversampling": 3}
CASES = {
    "kfac-tridiagonal": Case(model="perceptron", method="kfac-tridiagonal"),
    # Correlations between sums of entries, whose terms cancel: a few digits less than inverses of factors have.
    "two-level": Case(model="convolutional", method="two-level", note="around kfac-eigen", tolerance=1e-8),
    "rs-kfac": Case(model="grouped", method="rs-kfac", settings={"rank": 5, "oversampling": 2}),
    "sre-kfac": Case(model="grouped", method="sre-kfac", settings={"rank": 5, "oversampling": 2}),
    "b-kfac": Case(model="perceptron", method="b-kfac", settings=BRAND, note="Brand on A and G"),
    "b-kfac, convolutions": Case(model="convolutional", method="b-kfac", settings=BRAND, note="randomised SVD"),
    "b-r-kfac": Case(model="perceptron", method="b-r-kfac", settings=BRAND, note="Brand on A and G"),
    "b-kfac-c": Case(model="perceptron", method="b-kfac-c", settings=BRAND, note="Brand on A, randomised SVD on G"),
    # With fewer examples factors would be singular: which basis their null spaces get is rounding's choice, and scales
    # measured later depend on it.
    "ekfac": Case(model="grouped", method="ekfac", batch=24),
    # A coordinate is divided by its own size, also one of which few digits are left.
    "ekfac-adam": Case(model="grouped", method="ekfac-adam", batch=24, tolerance=1e-7),
    "ekfac-adam, few": Case(model="grouped", method="ekfac-adam", settings={"rank": 1}, batch=24, tolerance=1e-7),
    "eva": Case(model="grouped", method="eva"),
    # The moments of one gradient have a null space unless its matrix is square, with the same freedom.
    "soap": Case(model="square", method="soap", batch=24, tolerance=1e-6),
    "kl-shampoo": Case(model="square", method="kl-shampoo", batch=24, tolerance=1e-6),
    "shampoo": Case(model="grouped", method="shampoo", settings={"vectors": True, "block_size": 5}, tolerance=1e-8),
    "seng": Case(model="grouped", method="seng", settings={"columns": None, "form": "explicit"}, note="explicit"),
    "seng, implicit": Case(model="grouped", method="seng", settings={"form": "implicit"}, note="implicit"),
    "cg-fac": Case(model="grouped", method="cg-fac", settings={"operator": "kronecker", "warm_start": True}),
    "cg-fac, block": Case(
        model="grouped", method="cg-fac", settings={"operator": "block", "solve": "owner", "warm_start": True}
    ),
    "kfac, reduce": Case(model="pooled", method="kfac", options={"weight_sharing": "reduce"}),
    "kfac, exact": Case(model="grouped", method="kfac", options={"fisher": "exact"}),
}
ON_FOUR = ("seng", "seng, implicit", "cg-fac, block")


def batch_of(communicator: Communicator, step: int, n: int, world_size: int, ragged: bool) -> tuple[Tensor, Tensor]:
    """This rank's batch, or the union of those that are finite.

    Ragged: rank 0's is non-finite, the last one's half as long.
    """
    x, y = images(n * world_size, seed=step)
    parts = list(zip(x.split(n), y.split(n), strict=True))
    if ragged:
        parts[-1] = (parts[-1][0][: n // 2], parts[-1][1][: n // 2])
    if communicator.world_size > 1:
        x, y = parts[communicator.rank]
        return (x * torch.nan if ragged and communicator.rank == 0 else x), y
    kept = parts[1:] if ragged else parts
    return torch.cat([x for x, _ in kept]), torch.cat([y for _, y in kept])


def train(communicator: Communicator, case: Case, world_size: int, ragged: bool) -> dict[str, Tensor]:
    """Trains for a few steps; returns the parameters, and what the snapshots then make of a gradient of ones."""
    model = MODELS[case.model]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reducer = GradientReducer(list(model.parameters()), communicator)
    pre = kfdist.Preconditioner(
        model,
        make_inverter(case.method, **case.settings),
        damping=0.1,
        factor_period=1,
        inverse_period=2,
        kl_clip=1e-2,
        lr=0.1,
        adoption=kfdist.FixedLag(0),
        **case.options,
    )
    assert any(case.note in row.reason for row in pre.coverage().rows), str(pre.coverage())
    for step in range(STEPS):
        x, y = batch_of(communicator, step, case.batch, world_size, ragged)
        optimizer.zero_grad()
        output = model(x)
        if case.options.get("fisher") == "exact":
            pre.observe(output, "cross_entropy")
        nn.functional.cross_entropy(output, y).backward()
        reducer.reduce()
        if ragged:  # the mean of ragged ranks' gradients is not the union's; their statistics are
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.01)
        pre.step()
        optimizer.step()
    result = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    directions = pre.directions(0.05)
    result |= {f"direction of {name}": directions[parameter] for name, parameter in model.named_parameters()}
    counters = pre.counters()
    assert not counters["failures"]
    assert counters["inversions"]["by_method"] or communicator.world_size > 1
    assert set(counters["inversions"]["by_method"]) <= {case.method}
    pre.close()
    reducer.close()
    return result


def train_all(
    communicator: Communicator, names: tuple[str, ...], world_size: int, ragged: bool
) -> dict[str, dict[str, Tensor]]:
    """One start of the ranks for all methods."""
    return {name: train(communicator, CASES[name], world_size, ragged) for name in names}


# Light corrections pick random eigenvectors; where increments are filled up with zero rows, some of these stand for
# eigenvalue 0 and are rounding's choice.
RAGGED = tuple(name for name in CASES if name != "b-kfac-c")
# One of each kind of statistics; the others in the slow tier.
SOON = ("kfac-tridiagonal", "two-level", "rs-kfac", "b-kfac", "ekfac-adam", "soap", "seng", "cg-fac, block")
RUNS = [
    (2, False, tuple(CASES), ()),
    (2, True, SOON, ()),
    (2, True, tuple(name for name in RAGGED if name not in SOON), pytest.mark.slow),
    (4, False, ON_FOUR, ()),
]
_done: dict[tuple[int, bool, tuple[str, ...]], list[dict[str, dict[str, Tensor]]]] = {}


def results(world_size: int, ragged: bool, names: tuple[str, ...]) -> list[dict[str, dict[str, Tensor]]]:
    """Every rank's results of all methods."""
    if (world_size, ragged, names) not in _done:
        _done[world_size, ragged, names] = run_ranks(world_size, train_all, names, world_size, ragged)
    return _done[world_size, ragged, names]


@pytest.mark.parametrize(
    ("world_size", "ragged", "names", "name"),
    [
        pytest.param(w, ragged, names, name, id=f"{name} on {w}{' ragged' if ragged else ''}", marks=marks)
        for w, ragged, names, marks in RUNS
        for name in names
    ],
)
def test_ranks_equal_one_process_on_the_union(world_size: int, ragged: bool, names: tuple[str, ...], name: str) -> None:
    torch.set_num_threads(1)
    serial, tolerance = train(Communicator(None), CASES[name], world_size, ragged), CASES[name].tolerance
    for of_rank in results(world_size, ragged, names):
        for what, expected in serial.items():
            torch.testing.assert_close(
                of_rank[name][what], expected, rtol=tolerance, atol=tolerance, msg=lambda m, n=what: f"{n}: {m}"
            )
