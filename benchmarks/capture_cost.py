"""Shows what measuring costs a training step: the median of a step where all blocks are due, and where none is.

    python benchmarks/capture_cost.py [OUT.json]

Three models of torch alone, on one thread: forward and backward under a `Capture`, without reducing or inverting. Of a
step that measures, "watched" is the share of finding the uses of the weights, with the sums themselves left out. Writes
benchmarks/results/capture_cost.json unless told otherwise.
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
from kfdist.capture.capture import Capture
from kfdist.capture.requests import Request, Sampling
from kfdist.curvature.blocks import Block, make_blocks
from kfdist.models import build_model

RESULT = Path(__file__).parent / "results" / "capture_cost.json"
STEPS, WARM = 40, 5


def models() -> dict[str, tuple[nn.Module, Tensor]]:
    """Makes the models, by name, with a batch each."""
    layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True, dropout=0.0)
    dense: list[nn.Module] = []
    for _ in range(8):
        dense += [nn.Linear(256, 256), nn.ReLU()]
    return {
        "digits-cnn": (
            build_model("digits-cnn", {}, example_shape=(1, 8, 8), classes=10, seed=0),
            torch.randn(64, 1, 8, 8),
        ),
        "mlp of 8 layers": (nn.Sequential(*dense), torch.randn(128, 256)),
        "transformer of 4 layers": (
            nn.TransformerEncoder(layer, 4, enable_nested_tensor=False),
            torch.randn(8, 32, 128),
        ),
    }


def median_seconds(steps: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Returns the median of each kind of step; the kinds take turns, so that a slow minute is everybody's."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(STEPS + WARM):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(each[WARM:]) for name, each in seconds.items()}


def measure_model(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Measures one model."""
    made = [make_blocks(name, module) for name, module in model.named_modules()]
    blocks: dict[str, Block] = {block.name: block for each in made if not isinstance(each, str) for block in each}
    capture = Capture(model, blocks, sampling=Sampling(), grad_scaler=None)

    def train() -> None:
        model.zero_grad()
        model(x).square().mean().backward()

    def nothing_due() -> None:
        capture.arm({})
        train()
        capture.drain()

    def due(sums: frozenset[str]) -> Callable[[], object]:
        requests = {name: Request(sums=sums) for name in blocks}

        def step() -> None:
            capture.arm(requests)
            train()
            capture.drain()
            capture.arm({})

        return step

    capture.arm({})
    found = median_seconds(
        {
            "plain": train,
            "watched": due(frozenset()),
            "all_due": due(frozenset({"A", "G"})),
            "nothing_due": nothing_due,
        }
    )
    capture.close()
    return {
        "blocks": len(blocks),
        "plain_ms": round(1e3 * found["plain"], 3),
        **{name: round(seconds / found["plain"], 3) for name, seconds in found.items() if name != "plain"},
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
