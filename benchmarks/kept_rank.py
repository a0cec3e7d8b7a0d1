"""Shows how many eigenpairs `direction_error` leaves of rank 220 on models in training, and what applying them takes.

    PYTHONPATH=. python -m benchmarks.kept_rank [MODEL ...] [--steps STEPS] [--json FILE]

Trains each with `kfdist.Preconditioner(model)`: rs-kfac, rank 220, damping 0.03, periods 10 and 100, inverses one step
late; SGD with momentum 0.9 beneath. At some steps it looks at the inverses in use. Applying one to a gradient of p x q
takes 4 k p q operations for each factor that is held by k eigenpairs, or 2 d p q where its d x d inverse, if d is at
most 2 k, is applied as a dense matrix. "bytes" are those of the eigenpairs. The figures don't depend on the machine or
its load.
"""

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import kfdist
from kfdist.bench.workloads import WORKLOADS, Workload, smooth_images
from kfdist.curvature.inverse import KroneckerSpectrum
from kfdist.models import build_model
from kfdist.system.provenance import versions

RANK = 220
RESNET50 = Workload(
    title="ResNet-50, images of 64 x 64, batch 16",
    batch_size=16,
    lr=0.05,
    model=lambda seed: build_model(
        "torchvision", {"architecture": "resnet50"}, example_shape=(3, 64, 64), classes=10, seed=seed
    ),
    batches=lambda generator: lambda: smooth_images((3, 64, 64), 16, generator),
)
MODELS = {**WORKLOADS, "resnet50": RESNET50}


@dataclass(frozen=True, kw_only=True)
class Look:
    """What the inverses in use hold at a step.

    Attributes:
        model: Which.
        step: At which.
        loss: Of the step.
        pairs: Eigenpairs kept of all factors.
        pairs_of_rank: As many as rank 220 has.
        flops: Operations of applying the inverses once, in millions.
        flops_of_rank: What they were with all pairs.
        megabytes: Of the eigenpairs, in float32.
        megabytes_of_rank: Of all pairs.
        largest_error: The largest bound of a block.
        blocks_at_rank: Blocks whose bound is above `direction_error`, since the rank is the limit.
        blocks: How many there are.
    """

    model: str
    step: int
    loss: float
    pairs: int
    pairs_of_rank: int
    flops: float
    flops_of_rank: float
    megabytes: float
    megabytes_of_rank: float
    largest_error: float
    blocks_at_rank: int
    blocks: int


def look(model: str, step: int, loss: float, preconditioner: kfdist.Preconditioner) -> Look:
    """Counts what is in use."""
    totals: dict[str, tuple[float, float]] = dict.fromkeys(("pairs", "flops", "megabytes"), (0.0, 0.0))
    errors = [each["direction_error"] for each in preconditioner.diagnostics().values() if "direction_error" in each]

    def add(what: str, kept: float, of_rank: float) -> None:
        totals[what] = totals[what][0] + kept, totals[what][1] + of_rank

    for track in preconditioner.pipeline.tracks:
        for inverse in track.snapshot.preconditioners.values():
            if not isinstance(inverse, KroneckerSpectrum):
                continue
            c, p, q = inverse.shape
            for d, k in ((q, inverse.U_A.shape[-1]), (p, inverse.U_G.shape[-1])):
                r = min(RANK, d)
                add("pairs", c * k, c * r)
                add("flops", *(2e-6 * c * p * q * min(2 * each, d) for each in (k, r)))
                add("megabytes", *(4e-6 * c * (d + 1) * each for each in (k, r)))
    return Look(
        model=model,
        step=step,
        loss=round(loss, 3),
        pairs=int(totals["pairs"][0]),
        pairs_of_rank=int(totals["pairs"][1]),
        flops=round(totals["flops"][0], 1),
        flops_of_rank=round(totals["flops"][1], 1),
        megabytes=round(totals["megabytes"][0], 2),
        megabytes_of_rank=round(totals["megabytes"][1], 2),
        largest_error=round(max(errors), 4),
        blocks_at_rank=sum(error > 0.05 for error in errors),
        blocks=len(errors),
    )


def train(name: str, steps: Iterable[int]) -> list[Look]:
    """Trains, and looks at some steps."""
    workload, wanted = MODELS[name], sorted(steps)
    model, draw = workload.model(0).train(), workload.batches(torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=workload.lr, momentum=0.9)
    found = []
    with kfdist.Preconditioner(model, adoption=kfdist.FixedLag(1)).attach(optimizer) as preconditioner:
        for step in range(wanted[-1] + 1):
            optimizer.zero_grad()
            loss = workload.loss(model, draw())
            loss.backward()
            optimizer.step()
            if step in wanted:
                found.append(look(name, step, loss.item(), preconditioner))
                print(_line(found[-1]), flush=True)
    return found


def _line(each: Look) -> str:
    parts = [f"{each.model:10} {each.step:5d} {each.loss:6.2f}", f"{each.pairs:7d} of {each.pairs_of_rank:7d}"]
    for kept, of_rank in ((each.flops, each.flops_of_rank), (each.megabytes, each.megabytes_of_rank)):
        parts.append(f"{kept:8.1f} of {of_rank:8.1f} ({kept / of_rank:4.0%})")
    return "  ".join([*parts, f"{each.largest_error:8.3g}", f"{each.blocks_at_rank:3d} of {each.blocks}"])


def main() -> None:
    """Trains, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["mlp", "gpt", "resnet18"], help=f"of {', '.join(MODELS)}")
    parser.add_argument("--steps", default="2,120,520", help="steps to look at")
    parser.add_argument("--json", type=Path, help="file to write to")
    arguments = parser.parse_args()
    print(
        "model       step   loss  pairs               Mflop of applying               MB                         ",
        end="",
    )
    print("largest bound  blocks at rank")
    begun, found = time.time(), []
    for name in arguments.models:
        found += train(name, [int(step) for step in arguments.steps.split(",")])
    if arguments.json:
        content = {
            "versions": versions(),
            "seconds": round(time.time() - begun),
            "looks": [asdict(each) for each in found],
        }
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
