"""Shows what sampling by cost does to factors and directions, beside the noise that batches bring anyway.

    python benchmarks/sampling_error.py [OUT.json]

The models of `kfdist bench overhead`, untrained and held still: 20 batches enter the moving averages twice, sampled as
by default and whole, and 20 others once. Told are medians over the layers, relative, in Frobenius norm: the distance of
the sampled average from the whole one, that of the two whole ones (over the root of 2, what one has of noise), and the
same of K-FAC's directions at a damping of 1e-3. Writes benchmarks/results/sampling_error.json unless told otherwise.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from capture_cost import DECAY, blocks_of, empty_sums, wanted_of
from torch import Tensor

from kfdist.bench.measuring import measured
from kfdist.bench.workloads import WORKLOADS, Workload
from kfdist.capture.capture import Capture
from kfdist.capture.requests import Request, Sampling
from kfdist.curvature.averages import decay_at, means
from kfdist.curvature.blocks import LayerBlock

RESULT = Path(__file__).parent / "results" / "sampling_error.json"
UPDATES, DAMPING = 20, 1e-3

Factors = dict[str, tuple[Tensor, Tensor]]


def averages(workload: Workload, sampling: Sampling, seed: int) -> tuple[Factors, dict[str, Tensor]]:
    """Returns A and G of each layer after `UPDATES` batches, and the gradients of the last one."""
    model, draw = workload.model(0), workload.batches(torch.Generator().manual_seed(seed))
    blocks = {name: each for name, each in blocks_of(model).items() if wanted_of(each) == {"A", "G"}}
    sums = empty_sums(blocks)
    capture = Capture(model, blocks, sampling=sampling, grad_scaler=None)
    for k in range(1, UPDATES + 1):
        seeds = {name: 1000 * k + number for number, name in enumerate(blocks)}
        capture.arm({name: Request(seed=seeds[name], whole=k == 1) for name in blocks})
        model.zero_grad()
        workload.loss(model, draw()).backward()
        for name, batch in capture.drain().items():
            sums[name].fold(batch, decay_at(k, DECAY))
    capture.close()
    factors = {name: means({**each.sums, **each.counts}) for name, each in sums.items()}
    gradients = {name: block.gradient() for name, block in blocks.items() if isinstance(block, LayerBlock)}
    return {name: (each["A"], each["G"]) for name, each in factors.items()}, gradients


def direction(A: Tensor, G: Tensor, V: Tensor) -> Tensor:
    """Returns (G + gamma / pi)^-1 V (A + gamma pi)^-1, factored Tikhonov damping with gamma = root of lambda."""
    traces = [each.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30) for each in (A, G)]
    pi, gamma = (traces[0] / traces[1]).sqrt().reshape(-1, 1, 1), DAMPING**0.5
    eyes = [torch.eye(each.shape[-1]) for each in (A, G)]
    half = torch.linalg.solve(G + gamma / pi * eyes[1], V)
    return torch.linalg.solve(A + gamma * pi * eyes[0], half.mT).mT


def distance(found: Tensor, truth: Tensor) -> float:
    """Returns the relative distance in Frobenius norm."""
    return float((found - truth).norm() / truth.norm())


def measure(workload: Workload) -> dict[str, Any]:
    """Measures one model."""
    (sampled, _), (whole, V), (other, _) = (
        averages(workload, sampling, seed)
        for sampling, seed in (
            (Sampling(), 1),
            (Sampling(examples_fraction=1.0), 1),
            (Sampling(examples_fraction=1.0), 2),
        )
    )
    rows: dict[str, list[float]] = {}
    for name, (A, G) in whole.items():
        for label, i in (("A", 0), ("G", 1)):
            truth = whole[name][i]
            rows.setdefault(f"{label} of samples", []).append(distance(sampled[name][i], truth))
            rows.setdefault(f"{label} of other batches", []).append(distance(other[name][i], truth) / 2**0.5)
        truth = direction(A, G, V[name])
        rows.setdefault("direction of samples", []).append(distance(direction(*sampled[name], V[name]), truth))
        others = distance(direction(*other[name], V[name]), truth) / 2**0.5
        rows.setdefault("direction of other batches", []).append(others)
    return {label: round(statistics.median(each), 4) for label, each in rows.items()}


def main() -> None:
    """Measures and writes."""
    result = measured(lambda: {"models": {each.title: measure(each) for each in WORKLOADS.values()}})
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULT
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for name, found in result["models"].items():
        print(f"{name}: {found}")


if __name__ == "__main__":
    main()
