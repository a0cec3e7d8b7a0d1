"""What Brand's updates between two RSVDs are worth (arXiv 2210.08494; docs/papers.md, claim a).

One network is trained on the digits, 500 steps; its moving averages are followed twice: by RS-KFAC, which decomposes
them every `INVERSE_PERIOD` steps, and by B-R-KFAC, which does the same and takes the rows of every folding in between.
Both see the same statistics of the same trajectory, which neither of them chooses: the step is taken along the
direction of exact K-FAC. After every folding both are compared with the exact inverse of the moving average of that
moment, in float64. Damping is the published rule, phi = 0.1 of each factor's largest eigenvalue (algorithms.md 3.3).
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfdist.bench.claims import ClaimResult, Part
from kfdist.curvature.averages import BatchStatistics, WeightedSums, decay_at, means
from kfdist.curvature.inverse import KroneckerSpectrum
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.statistics import Increment, KroneckerFactors
from kfdist.data.sets import Digits
from kfdist.linalg.kronecker import Spectrum, solve_left
from kfdist.models.small import Mlp

TITLE = "Brand updates between RSVDs lower RS-KFAC's inversion error over 500 steps at little cost (2210.08494)"
ERROR_LIMIT = 0.9
COST_LIMIT = 0.1

DECAY, PHI, KL_CLIP, LEARNING_RATE = 0.95, 0.1, 1e-2, 0.1
FACTOR_PERIOD = 10
METHODS = ("rs-kfac", "b-r-kfac")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of the experiment.

    Attributes:
        hidden: Outputs of the hidden layers.
        batch: Examples a step, which are the rows of an increment.
        rank: Eigenpairs kept.
        inverse_period: Steps between two RSVDs.
        steps: Steps of training.
    """

    hidden: tuple[int, ...] = (512, 256)
    batch: int = 64
    rank: int = 64
    inverse_period: int = 100
    steps: int = 500


QUICK = Settings(hidden=(64, 48), batch=8, rank=8, inverse_period=20, steps=60)


@dataclass
class Tally:
    """Seconds and errors over the run.

    Attributes:
        seconds: CPU seconds of one thread by what they were spent on.
        action: Per method and folding, the relative error of (inverse) x gradient, over all wide layers at once.
        inverse: Per method and folding, the mean relative Frobenius error of the damped factors' inverses.
    """

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    action: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in METHODS})
    inverse: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in METHODS})
    losses: list[float] = field(default_factory=list)

    @contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """Adds the time inside the `with` block."""
        begun = time.thread_time()
        yield
        self.seconds[what] += time.thread_time() - begun

    def errors(self, join: Callable[[list[float]], float]) -> dict[str, dict[str, float]]:
        """Joins the errors over the foldings, by kind and method."""
        kinds = {"action": self.action, "inverse": self.inverse}
        return {kind: {name: join(found[name]) for name in METHODS} for kind, found in kinds.items()}


def measure_brand(quick: bool = False) -> ClaimResult:
    """Measures claim a.

    The rule, fixed before the measurement. Shown if, with B-R-KFAC in place of RS-KFAC,
    - the error of the inverse's action on the gradient, and the error of the factors' inverses, each averaged over all
      foldings, are at most 0.9 times as large;
    - the updates add at most a tenth to the CPU seconds of the whole run with RS-KFAC (forward, backward, foldings,
      inversions, applications).

    Args:
        quick: Small sizes, which take about a second and say nothing.
    """
    settings = QUICK if quick else Settings()
    tally = _train(settings)
    means = tally.errors(statistics.fmean)
    seconds = tally.seconds
    run = sum(seconds[what] for what in ("gradients", "foldings", "rs-kfac", "applications"))
    added = seconds["b-r-kfac"] - seconds["rs-kfac"]
    decompositions = settings.steps // settings.inverse_period
    updates = settings.steps // FACTOR_PERIOD - decompositions
    return ClaimResult(
        claim="a",
        title=TITLE,
        parts=(*(judge_error(kind, means[kind]) for kind in means), judge_cost(added, run, seconds["rs-kfac"])),
        figures={
            "mean_error": means,
            "median_error": tally.errors(statistics.median),
            "seconds": dict(seconds),
            "added_share": added / run,
            "seconds_of_all_layers": {"one_rsvd": seconds["rs-kfac"] / decompositions, "one_update": added / updates},
            "error_of_action_by_folding": tally.action,
            "error_of_inverses_by_folding": tally.inverse,
            "loss": {"first": tally.losses[0], "last_ten": statistics.fmean(tally.losses[-10:])},
        },
        conditions={
            "network": [64, *settings.hidden, 10],
            "data": "digits",
            "batch": settings.batch,
            "steps": settings.steps,
            "rank": settings.rank,
            "factor_period": FACTOR_PERIOD,
            "inverse_period": settings.inverse_period,
            "ema_decay": DECAY,
            "damping": f"relative, phi = {PHI}",
            "fisher": "empirical",
            "dtype": "float32, compared in float64",
            "trajectory": f"exact K-FAC, learning rate {LEARNING_RATE}, KL clip {KL_CLIP}",
            "compared": "factors that Brand updates, after every folding",
        },
    )


def judge_error(kind: str, mean: dict[str, float]) -> Part:
    """Applies the first rule of `measure_brand` to the mean errors by method, of kind "action" or "inverse"."""
    names = {"action": "the inverse's action on the gradient", "inverse": "the factors' inverses"}
    ratio = mean["b-r-kfac"] / mean["rs-kfac"]
    return Part(
        statement=f"mean error of {names[kind]} at most {ERROR_LIMIT} times RS-KFAC's",
        holds=ratio <= ERROR_LIMIT,
        seen=f"{mean['b-r-kfac']:.3g} with Brand, {mean['rs-kfac']:.3g} without: {ratio:.2f} times",
    )


def judge_cost(added: float, run: float, decompositions: float) -> Part:
    """Applies its second rule to the CPU seconds: added, of the run, and of the RSVDs in it."""
    return Part(
        statement=f"Brand's updates add at most {COST_LIMIT:.0%} to the run's CPU seconds",
        holds=added <= COST_LIMIT * run,
        seen=f"{added:.2f} s added to {run:.2f} s ({added / run:.0%}), of which RSVDs are {decompositions:.2f} s",
    )


def _train(settings: Settings) -> Tally:
    """Trains, follows the averages by both methods, and compares."""
    data = Digits().load().train
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [m for m in Mlp(hidden=settings.hidden).build((64,), 10).modules() if isinstance(m, nn.Linear)]
    averages = [
        WeightedSums(
            {"A": (1, m.in_features + 1, m.in_features + 1), "G": (1, m.out_features, m.out_features)},
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        for m in layers
    ]
    published: dict[str, Any] = {"damping_rule": "relative", "direction_error": 0.0}
    inverters = {
        "rs-kfac": make_inverter("rs-kfac", rank=settings.rank, **published),
        "b-r-kfac": make_inverter("b-r-kfac", rank=settings.rank, increment_rows=settings.batch, **published),
    }
    exact = make_inverter("kfac", damping_rule="relative")
    held: dict[str, list[Any]] = {name: [None] * len(layers) for name in METHODS}
    states: list[dict[str, Tensor]] = [{} for _ in layers]
    driving: list[Any] = []
    tally = Tally()
    for step in range(settings.steps):
        chosen = torch.randint(len(data.labels), (settings.batch,), generator=generator)
        with tally.spending("gradients"):
            rows, loss = _rows(layers, data.inputs[chosen].flatten(1), data.labels[chosen])
            gradients = [g.mT @ a / settings.batch for a, g in rows]
        tally.losses.append(loss)
        if step % FACTOR_PERIOD == 0:
            rho = decay_at(step // FACTOR_PERIOD + 1, DECAY)
            with tally.spending("foldings"):
                for average, (a, g) in zip(averages, rows, strict=True):
                    average.fold(BatchStatistics({"A": (a.mT @ a)[None], "G": (g.mT @ g)[None]}, len(a), len(a)), rho)
            due = step % settings.inverse_period == 0
            for index, average in enumerate(averages):
                if due:
                    with tally.spending("rs-kfac"):
                        found = inverters["rs-kfac"].invert(_factors(average), damping=PHI, previous={}, seed=step)
                    held["rs-kfac"][index] = found.preconditioner
                with tally.spending("b-r-kfac"):
                    increment = _increment(average, rows[index], rho, settings, due=due)
                    updated = inverters["b-r-kfac"].invert(increment, damping=PHI, previous=states[index], seed=step)
                held["b-r-kfac"][index], states[index] = updated.preconditioner, dict(updated.state)
            if due:
                driving = [
                    exact.invert(_factors(each), damping=PHI, previous={}, seed=0).preconditioner for each in averages
                ]
            _compare(tally, averages, held, gradients, settings)
        with tally.spending("applications"):
            for made, V in zip(held["rs-kfac"], gradients, strict=True):
                made.apply(V[None], PHI)
        _step(layers, driving, gradients)
    return tally


def _rows(layers: list[nn.Linear], inputs: Tensor, labels: Tensor) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """Returns each layer's inputs with the ones column and output gradients of the per-example loss; and the loss."""
    h, inputs_of, outputs_of = inputs, [], []
    for index, layer in enumerate(layers):
        inputs_of.append(h.detach())
        outputs_of.append(layer(h))
        h = outputs_of[-1].relu() if index < len(layers) - 1 else outputs_of[-1]
    loss = F.cross_entropy(h, labels)
    gradients = torch.autograd.grad(loss, outputs_of)
    rows = [(F.pad(a, (0, 1), value=1.0), len(a) * g) for a, g in zip(inputs_of, gradients, strict=True)]
    return rows, float(loss.detach())


def _factors(average: WeightedSums) -> KroneckerFactors:
    return KroneckerFactors(**means({**average.sums, **average.counts}))


def _brand_takes(d: int, settings: Settings) -> bool:
    return settings.rank + settings.batch < d


def _increment(
    average: WeightedSums, rows: tuple[Tensor, Tensor], rho: float, settings: Settings, *, due: bool
) -> Increment:
    """Makes the folding as the method asks for it: rows of the factors that Brand takes, dense ones where due."""
    scaled = [(1 - rho) ** 0.5 * each[None] for each in rows]
    absent = rows[0].new_zeros(1, 0, 0)
    own = [each if _brand_takes(each.shape[-1], settings) else each[:, :0] for each in scaled]
    dense = _factors(average) if due else KroneckerFactors(A=absent, G=absent)
    return Increment(
        A_rows=own[0],
        G_rows=own[1],
        examples=torch.tensor((1 - rho) * len(rows[0])),
        positions=torch.tensor((1 - rho) * len(rows[0])),
        decay=torch.tensor(rho),
        A=dense.A,
        G=dense.G,
    )


def _step(layers: list[nn.Linear], driving: list[Any], gradients: list[Tensor]) -> None:
    """Moves the parameters along exact K-FAC's direction, with the KL clip."""
    directions = [each.apply(V[None], PHI)[0] for each, V in zip(driving, gradients, strict=True)]
    quadratic = sum(float((U * V).sum()) for U, V in zip(directions, gradients, strict=True))
    nu = min(1.0, (KL_CLIP / (LEARNING_RATE**2 * max(quadratic, 1e-30))) ** 0.5)
    with torch.no_grad():
        for layer, U in zip(layers, directions, strict=True):
            layer.weight.sub_(LEARNING_RATE * nu * U[:, :-1])
            layer.bias.sub_(LEARNING_RATE * nu * U[:, -1])


def _compare(
    tally: Tally, averages: list[WeightedSums], held: dict[str, list[Any]], gradients: list[Tensor], settings: Settings
) -> None:
    """Compares both methods with the exact inverses of the averages of this moment."""
    truths: list[list[tuple[str, Tensor, Tensor]]] = []
    for average in averages:
        factors = _factors(average)
        found = []
        for label, matrix in (("A", factors.A[0].double()), ("G", factors.G[0].double())):
            damping = PHI * torch.linalg.eigvalsh(matrix)[-1]
            found.append((label, damping, torch.linalg.inv(matrix + damping * torch.eye(len(matrix)).double())))
        truths.append(found)
    for name in METHODS:
        off, total, inverses = 0.0, 0.0, []
        for made, truth, V in zip(held[name], truths, gradients, strict=True):
            taken = [each for each in truth if _brand_takes(each[2].shape[-1], settings)]
            if not taken:
                continue
            expected = truth[1][2] @ V.double() @ truth[0][2]
            off += float((made.apply(V[None], PHI)[0].double() - expected).square().sum())
            total += float(expected.square().sum())
            inverses += [_inverse_error(made, *each) for each in taken]
        tally.action[name].append((off / total) ** 0.5)
        tally.inverse[name].append(statistics.fmean(inverses))


def _inverse_error(made: KroneckerSpectrum, label: str, damping: Tensor, truth: Tensor) -> float:
    """Returns how far a factor's inverse, damped as the truth is, lies from it, relative to it."""
    vectors, values, tail = (getattr(made, f"{part}_{label}")[0].double() for part in ("U", "w", "tail"))
    inverse = solve_left(Spectrum(vectors, values, tail), damping, torch.eye(len(vectors)).double())
    return float((inverse - truth).norm() / truth.norm())
