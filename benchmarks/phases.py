"""Shows what it costs and gains to spread foldings where the number of blocks divides the inverse period.

    PYTHONPATH=. python -m benchmarks.phases [OUT.json]

Ten layers of a tanh network learn what one of two layers says, behind `kfac-eigen` with the default periods of 10
and 100 steps. "exact shares" has each block's phase at its exact share of the inverse period, by which all ten blocks
fold at one step of ten; "as it is" spreads them. Told are the mean loss of the last hundred steps by seed, and the CPU
milliseconds of the thread that trains, a step. Writes benchmarks/results/phases.json unless told otherwise.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import kfdist
from kfdist.bench.measuring import measured
from kfdist.policies import schedule

RESULT = Path(__file__).parent / "results" / "phases.json"
SEEDS, STEPS, WARM, WIDTH, BATCH = 4, 300, 100, 64, 128
SPREAD = schedule.phase_of


def exact_share(group: int, groups: int, factor_period: int, inverse_period: int, together: bool) -> int:
    """Returns the phase that is an exact share of the inverse period."""
    phase = group * inverse_period // groups
    return phase - phase % factor_period if together else phase


def network(seed: int, depth: int) -> nn.Sequential:
    """Returns `depth` linear layers with tanh between them."""
    torch.manual_seed(seed)
    layers = [layer for _ in range(depth - 1) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def train(phase_of: Callable[..., int], seed: int) -> tuple[float, list[float]]:
    """Trains; returns the mean loss of the last hundred steps, and the CPU milliseconds of each step after `WARM`."""
    schedule.phase_of = phase_of
    teacher, model = network(1000 + seed, 2), network(seed, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses, milliseconds = [], []
    adoption = kfdist.FixedLag(5)
    with kfdist.Preconditioner(model, "kfac-eigen", lr=0.05, adoption=adoption) as preconditioner:
        for _ in range(STEPS):
            x = torch.randn(BATCH, WIDTH)
            target = teacher(x).argmax(1)
            begun = time.thread_time()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            preconditioner.step()
            optimizer.step()
            milliseconds.append(1e3 * (time.thread_time() - begun))
            losses.append(loss.item())
    return statistics.mean(losses[-100:]), milliseconds[WARM:]


def measure() -> dict[str, Any]:
    """Trains both ways by turns."""
    losses: dict[str, list[float]] = {}
    taken: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        for name, phase_of in (("exact shares", exact_share), ("as it is", SPREAD)):
            loss, milliseconds = train(phase_of, seed)
            losses.setdefault(name, []).append(round(loss, 4))
            taken.setdefault(name, []).extend(milliseconds)
    cpu = {
        name: {
            "mean": round(statistics.mean(each), 2),
            "p50": round(statistics.median(each), 2),
            "p95": round(statistics.quantiles(each, n=20)[-1], 2),
        }
        for name, each in taken.items()
    }
    return {"loss_by_seed": losses, "cpu_milliseconds": cpu}


def main() -> None:
    """Measures, prints and writes."""
    found = measured(measure)
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULT
    out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: found[name] for name in ("loss_by_seed", "cpu_milliseconds")}, indent=2))


if __name__ == "__main__":
    main()
