"""Shows what an update of the statistics costs a step: with all blocks due, sampled by cost and whole, and with none.

    python benchmarks/capture_cost.py [OUT.json]

The models of `kfdist bench overhead` and two smaller ones, on one thread: forward and backward under a `Capture`, and
the folding into the moving averages, without reducing or inverting; what that adds to a plain step's CPU time, as a
share of it. "watched" is what finding the uses of the weights adds, and the norms' statistics, without the factors.
Writes benchmarks/results/capture_cost.json unless told otherwise. What sampling does to the factors:
benchmarks/sampling_error.py.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kfdist.bench.measuring import measured
from kfdist.bench.workloads import WORKLOADS
from kfdist.capture.capture import Capture
from kfdist.capture.requests import Request, Sampling
from kfdist.curvature.averages import WeightedSums, sum_shapes
from kfdist.curvature.blocks import Block, EmbeddingBlock, UnitBlock, make_blocks
from kfdist.curvature.statistics import Needs
from kfdist.models import build_model

RESULT = Path(__file__).parent / "results" / "capture_cost.json"
STEPS, WARM = 20, 3
DECAY = 0.95


def models() -> dict[str, tuple[nn.Module, Callable[[nn.Module], Tensor]]]:
    """Makes the models, by name, with the loss of one batch each."""
    dense: list[nn.Module] = []
    for _ in range(8):
        dense += [nn.Linear(256, 256), nn.ReLU()]
    small = {
        "digits-cnn, batch 64": (
            build_model("digits-cnn", {}, example_shape=(1, 8, 8), classes=10, seed=0),
            torch.randn(64, 1, 8, 8),
        ),
        "MLP of 8 x 256, batch 128": (nn.Sequential(*dense), torch.randn(128, 256)),
    }
    found: dict[str, tuple[nn.Module, Callable[[nn.Module], Tensor]]] = {}
    for workload in WORKLOADS.values():
        batch = workload.batches(torch.Generator().manual_seed(0))()
        found[workload.title] = workload.model(0), lambda model, w=workload, batch=batch: w.loss(model, batch)
    for name, (model, x) in small.items():
        found[name] = model, lambda model, x=x: model(x).square().mean()
    return found


def median_seconds(steps: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Returns the median of each kind of step; the kinds take turns, so that a slow minute is everybody's."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(STEPS + WARM):
        for name, step in steps.items():
            begun = time.thread_time()
            step()
            seconds[name].append(time.thread_time() - begun)
    return {name: statistics.median(each[WARM:]) for name, each in seconds.items()}


def blocks_of(model: nn.Module) -> dict[str, Block]:
    """Makes the blocks of all layers."""
    made = [make_blocks(name, module) for name, module in model.named_modules()]
    return {block.name: block for each in made if not isinstance(each, str) for block in each}


def wanted_of(block: Block) -> frozenset[str]:
    """Returns the sums that `kfac` has of a block."""
    if isinstance(block, UnitBlock):
        return frozenset({"F"})
    return frozenset({"A_diagonal", "G"} if isinstance(block, EmbeddingBlock) else {"A", "G"})


def empty_sums(blocks: Mapping[str, Block]) -> dict[str, WeightedSums]:
    """Makes the moving averages of `kfac`."""
    return {
        name: WeightedSums(sum_shapes(block.shape, Needs(sums=wanted_of(block))), dtype=torch.float32, device="cpu")
        for name, block in blocks.items()
    }


def measure_model(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Any]:
    """Measures one model."""
    blocks = blocks_of(model)
    sums = {name: empty_sums(blocks) for name in ("update", "update_of_all")}
    captures = {
        name: Capture(model, blocks, sampling=sampling, grad_scaler=None)
        for name, sampling in (("update", Sampling()), ("update_of_all", Sampling(examples_fraction=1.0)))
    }

    def train() -> None:
        model.zero_grad()
        loss(model).backward()

    def nothing_due() -> None:
        captures["update"].arm({})
        train()
        captures["update"].drain()

    def due(name: str, wanted: Callable[[Block], frozenset[str]]) -> Callable[[], object]:
        requests = {each: Request(sums=wanted(block)) for each, block in blocks.items()}

        def step() -> None:
            captures[name].arm(requests)
            train()
            found = captures[name].drain()
            for each, total in sums[name].items():
                if wanted is wanted_of:
                    total.fold(found.get(each), DECAY)
            captures[name].arm({})

        return step

    found = median_seconds(
        {
            "plain": train,
            "nothing_due": nothing_due,
            "watched": due("update", lambda _: frozenset()),
            "update": due("update", wanted_of),
        }
    )
    # Apart: what it leaves in caches, and gives back to the system, would be a burden to the others.
    whole = median_seconds({"plain": train, "update_of_all": due("update_of_all", wanted_of)})
    for capture in captures.values():
        capture.close()
    return {
        "blocks": len(blocks),
        "plain_ms": round(1e3 * found["plain"], 3),
        **{name: round(seconds / found["plain"] - 1, 3) for name, seconds in found.items() if name != "plain"},
        "update_of_all": round(whole["update_of_all"] / whole["plain"] - 1, 3),
    }


def main() -> None:
    """Measures and writes."""
    torch.manual_seed(0)
    result = measured(lambda: {"models": {name: measure_model(*each) for name, each in models().items()}})
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULT
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for name, found in result["models"].items():
        print(f"{name}: {found}")


if __name__ == "__main__":
    main()
