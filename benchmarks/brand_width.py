"""A layer of 16,385 inputs, as the B-KFAC paper has it: Brand's update beside the RSVD (arXiv 2210.08494).

One factor, rank 220, 256 rows an update, with the diagnostics of both. CPU seconds of one thread, least of the
repetitions. Takes a minute and 2 GB; writes benchmarks/results/brand_width.json.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch

from kfdist.bench.measuring import measured
from kfdist.curvature.held_factor import HeldFactor
from kfdist.curvature.spectra import randomized_spectrum

INPUTS, RANK, ROWS, DIRECTIONS = 16385, 220, 256, 400
UPDATES, DECOMPOSITIONS = 8, 2
RESULTS = Path(__file__).parent / "results" / "brand_width.json"


def measure() -> dict[str, Any]:
    """Times both on rows in 400 directions whose lengths fall as 1/k."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(DIRECTIONS, INPUTS, generator=generator) / torch.arange(1, DIRECTIONS + 1)[:, None]

    def draw() -> torch.Tensor:
        return (torch.randn(ROWS, DIRECTIONS, generator=generator) @ base)[None] / ROWS**0.5

    held, updates = HeldFactor.empty(torch.zeros(1, ROWS, INPUTS), RANK), []
    for step in range(UPDATES):
        rows, begun = draw(), time.thread_time()
        held, _ = held.decayed(torch.tensor(0.95), torch.tensor(float(ROWS))).updated(rows, seed=step, label="A")
        held.diagnostics("A", seed=step)
        updates.append(time.thread_time() - begun)
    matrix = torch.zeros(1, INPUTS, INPUTS)
    for _ in range(3):
        (rows,) = draw()
        matrix[0].addmm_(rows.mT, rows)
    decompositions = []
    for step in range(DECOMPOSITIONS):
        begun = time.thread_time()
        randomized_spectrum(matrix, rank=RANK, oversampling=10, power_iterations=4, method="rsvd", seed=step, label="A")
        decompositions.append(time.thread_time() - begun)
    one_update, one_rsvd = min(updates[2:]), min(decompositions)  # the first updates have fewer columns
    return {
        "inputs": INPUTS,
        "rank": RANK,
        "rows": ROWS,
        "seconds": {"updates": updates, "rsvds": decompositions, "one_update": one_update, "one_rsvd": one_rsvd},
        "updates_per_rsvd": one_rsvd / one_update,
    }


if __name__ == "__main__":
    RESULTS.write_text(json.dumps(measured(measure), indent=2) + "\n", encoding="utf-8")
    print(RESULTS)
